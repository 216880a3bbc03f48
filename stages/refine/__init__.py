"""Masks refined without training. Methods §4."""

from stages.refine.grow_and_prune import dsnot, r2_dsnot
from stages.refine.sparse_swaps import swaps

__all__ = ["dsnot", "r2_dsnot", "swaps"]
