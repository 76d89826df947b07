"""One generating request, whatever its schema: what it names, what it gets, and what became of it."""
