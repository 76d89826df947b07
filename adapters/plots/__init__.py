"""Drawing what was measured."""
