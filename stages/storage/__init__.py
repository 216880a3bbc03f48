"""Checkpoints and activations on disk: read by their headers, written whole or not at all."""
