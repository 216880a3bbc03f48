"""Short scripts and recipes to begin from; each is run by a test."""
