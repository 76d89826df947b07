"""Clients that do everything at once for a while, and a look at what is left of it."""
