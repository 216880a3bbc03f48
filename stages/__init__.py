"""A model's stream, scores, masks, refinements, solved and reconstructed weights, training. No Ray, no MLflow."""
