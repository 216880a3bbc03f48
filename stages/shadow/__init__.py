"""The shadow of the weights. stages/README.md §8."""

from espalier.stages.shadow.tracker import ShadowTracker

__all__ = ["ShadowTracker"]
