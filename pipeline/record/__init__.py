"""What is recorded: MLflow, and a copy of every number on disk."""
