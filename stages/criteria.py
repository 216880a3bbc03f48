"""Importance scores: pure functions of a weight and its input statistics. Methods §2.

A new criterion is one function and one entry in CRITERIA. Letters: O = output rows, I = input columns.
"""

from difflib import get_close_matches
from typing import Any, Protocol

from torch import Tensor

from stages.errors import Refusal
from stages.statistics import InputStatistics


class Criterion(Protocol):
    """Scores (O, I) in float32 of a weight (O, I); a higher score survives longer."""

    def __call__(self, weight_OI: Tensor, statistics: InputStatistics) -> Tensor: ...


def magnitude(weight_OI: Tensor, statistics: InputStatistics) -> Tensor:
    """|W_ij|. Needs no statistics."""
    return weight_OI.float().abs()


def wanda(weight_OI: Tensor, statistics: InputStatistics) -> Tensor:
    """|W_ij| · ‖X_j‖₂, the norm over all calibration tokens (Sun et al. 2023, 2306.11695, Eq. 1)."""
    return weight_OI.float().abs() * statistics.norm.to(weight_OI.device)


CRITERIA: dict[str, Criterion] = {"magnitude": magnitude, "wanda": wanda}
ROW_WISE = frozenset({"magnitude", "wanda"})  # those whose scores of a row depend on no other row


def check_criterion(name: str) -> str:
    """The name itself. Raises Refusal naming the nearest criterion if there is none of this name."""
    if name not in CRITERIA:
        nearest = get_close_matches(name, CRITERIA, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise Refusal(f"criterion {name!r} is unknown; {hint}there are: {', '.join(CRITERIA)}")
    return name


def score(name: str, weight: Tensor, statistics: InputStatistics, **options: Any) -> Tensor:
    """Importance (O, I) float32 of every weight (O, I) under the criterion `name`; higher is more important.

    Raises Refusal for an unknown criterion, and for a score that is not finite.
    """
    scores = CRITERIA[check_criterion(name)](weight, statistics, **options)
    if not scores.sum().isfinite():
        raise Refusal(f"criterion {name}: scores are not finite; weights or calibration inputs overflow float32")
    return scores
