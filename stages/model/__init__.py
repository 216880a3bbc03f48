"""What a model's blocks consist of, found in the model itself: families, anatomy, calls, experts."""
