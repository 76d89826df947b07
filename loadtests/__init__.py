"""Scripts that measure a running server."""
