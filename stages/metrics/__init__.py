"""What is measured: perplexity, divergence, operations, energy, memory and time."""
