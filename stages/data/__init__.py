"""Samples: token tables, images and their captions, training batches."""
