"""Training a nested adapter: the layer, the ranks that its steps draw, and transformers' Trainer around them."""
