"""The evidence: the paper's comparison, trained and measured on real data. `python -m adapters.paper --help`."""
