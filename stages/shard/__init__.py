"""One shard of a run: its blocks, what they are calibrated on, and how each is pruned."""
