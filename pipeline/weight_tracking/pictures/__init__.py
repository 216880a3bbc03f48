"""The picture experiment: rendered labels, and a small model that reads them."""
