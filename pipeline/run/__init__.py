"""What every run has: its directory, inputs, progress, costs, end."""
