"""Nested low-rank adapters: train once, use at every rank up to r_max."""
