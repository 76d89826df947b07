"""The interface of text-generation-inference and LoRAX."""
