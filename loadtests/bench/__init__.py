"""The engine alone, beside other engines on the same work: `make bench`."""
