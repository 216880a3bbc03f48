"""A model's stream, scores, masks, refinements, solved and rebuilt weights, training. No Ray, no MLflow."""
