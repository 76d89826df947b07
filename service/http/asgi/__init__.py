"""Around every route: connections, keys, limits, logs, and the form of refusals."""
