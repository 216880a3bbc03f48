"""A model without its weights, and how the tensors of a checkpoint become those of its blocks."""
