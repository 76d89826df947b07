"""Which rank serves a request: what it will take, what it is worth, and the policies that choose. No torch."""
