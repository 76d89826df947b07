"""Products written in C for the CPU at hand: the base's, the adapters' and attention's."""
