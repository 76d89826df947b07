"""The server: one base model, any number of nested adapters, the rank chosen per request."""
