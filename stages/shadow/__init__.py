"""The shadow of the weights. Methods §8."""

from stages.shadow.tracker import ShadowTracker

__all__ = ["ShadowTracker"]
