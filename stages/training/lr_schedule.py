"""The learning rate over a run."""

import math

from espalier.stages.training.spec import Schedule

FLOOR = 0.1  # share of the peak that a cosine or linear schedule ends at


def rate_at(step: int, *, peak: float, schedule: Schedule, warmup: int, steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0) of `steps`.

    It climbs linearly over `warmup` steps, reaching `peak` at the last of them, then stays (constant) or falls to FLOOR
    of it at the last step, along a line or along half a cosine.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    done = (step - warmup) / max(1, steps - 1 - warmup)
    left = 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return peak * (FLOOR + (1 - FLOOR) * left)
