"""`espalier retrain`, from the request to the trained checkpoint."""
