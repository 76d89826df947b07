"""Adapters as the server holds them: uploaded, listed, changed, measured."""
