"""How a shadow averages the weights of a training run: the options, and what each snapshot weighs.
stages/README.md §8."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from espalier.stages.errors import Refusal

Schedule = Literal["linear", "exponential", "uniform"]
Dtype = Literal["fp32", "bf16", "int8"]
Rounding = Literal["stochastic", "compensated"]


@dataclass(frozen=True, kw_only=True)
class ShadowSpec:
    """How weights are averaged over a run. Raises Refusal for what cannot be."""

    schedule: Schedule = "linear"
    decay: float = 0.99  # γ of the exponential schedule
    signed: bool = True  # average p; else |p|
    window: int | None = None  # only so many snapshots count, the last ones
    dtype: Dtype = "fp32"
    rounding: Rounding = "stochastic"  # of bf16
    every: int = 1  # optimizer steps from one snapshot to the next

    def __post_init__(self) -> None:
        for name, kinds in (("schedule", Schedule), ("dtype", Dtype), ("rounding", Rounding)):
            if (value := getattr(self, name)) not in get_args(kinds):
                raise Refusal(f"shadow {name} {value!r}: choose {', '.join(get_args(kinds))}")
        if not 0 < self.decay < 1:
            raise Refusal(f"shadow decay {self.decay}: must be above 0 and below 1; try 0.99")
        for name in ("window", "every"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise Refusal(f"shadow {name} {count}: must be at least 1")
        if self.rounding == "compensated" and self.dtype != "bf16":
            raise Refusal(f"shadow rounding compensated with dtype {self.dtype}: it is for bf16; leave it out")


def share(schedule: Schedule, decay: float, n: int) -> float:
    """m_n / S_n, n = 0, 1, ...: what snapshot n weighs among all so far.

    m_n is n + 1 (linear), decay^-n (exponential) or 1 (uniform). Nothing overflows: the exponential share is
    (1 - decay) / (1 - decay^(n + 1)), which falls to 1 - decay and stays there.
    """
    if schedule == "linear":
        return 2 / (n + 2)
    if schedule == "uniform":
        return 1 / (n + 1)
    return math.expm1(math.log(decay)) / math.expm1((n + 1) * math.log(decay))


def window_shares(schedule: Schedule, decay: float, n: int, window: int) -> list[float]:
    """What the last snapshots of n, at most `window` of them, weigh among themselves, oldest first."""
    counted = range(max(0, n - window), n)
    if schedule == "linear":
        weights = [float(i + 1) for i in counted]
    elif schedule == "uniform":
        weights = [1.0] * len(counted)
    else:
        weights = [decay ** (n - 1 - i) for i in counted]
    return [weight / sum(weights) for weight in weights]
