"""What a run will need and where it will lie, from a model's facts alone."""
