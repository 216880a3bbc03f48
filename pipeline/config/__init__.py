"""The request: the same names and checks from flags, YAML and Python."""
