"""`espalier prune`, from the request to the pruned checkpoint."""
