"""The latency model at start-up: measured in a short sweep, kept on disk."""
