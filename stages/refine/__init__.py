"""Masks refined without training. stages/README.md §4."""

from espalier.stages.refine.grow_and_prune import dsnot, r2_dsnot
from espalier.stages.refine.refinement import REFINEMENTS, Refinement, find_refinement
from espalier.stages.refine.sparse_swaps import swaps

__all__ = ["REFINEMENTS", "Refinement", "dsnot", "find_refinement", "r2_dsnot", "swaps"]
