"""`espalier demo`: a small model that is in the package, pruned three ways, offline."""
