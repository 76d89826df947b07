"""Adapters by name on disk, and the archives they travel in."""
