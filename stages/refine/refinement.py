"""The refinements by name: each one's function, what it reads, and when `auto` chooses it. A new one is a line here."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from espalier.stages.criteria.criterion import Need
from espalier.stages.errors import Refusal, unknown
from espalier.stages.refine.grow_and_prune import dsnot, r2_dsnot
from espalier.stages.refine.sparse_swaps import swaps
from espalier.stages.statistics import InputStatistics


@dataclass(frozen=True, kw_only=True, slots=True)
class Refinement:
    """A function from a mask to a better one, and what the work must know about it."""

    function: Callable[..., Tensor]
    """(weight (O, I), keep (O, I), statistics, pattern) -> keep (O, I), with as many zeros in each row, or group."""
    needs: frozenset[Need] = frozenset()
    """What the statistics must hold beyond the sums over inputs: see `Criterion.needs`."""
    by_scores: bool = False
    """In groups of N:M it reads the scores (O, I) that the mask was made with, by the keyword `scores`, unless they
    are Wanda's, which it makes itself."""
    auto_from: float | None = None
    """`refine: auto` chooses it where units are reconstructed, on so many tokens or more for each channel of the widest
    input: from there on reconstruction costs much more than it does. None: only where it is asked for."""

    def __call__(
        self,
        weight: Tensor,
        keep: Tensor,
        statistics: InputStatistics,
        pattern: tuple[int, int] | None,
        scores: Callable[[], Tensor | None],
    ) -> Tensor:
        """The refined mask. `scores` makes the scores that the mask was made with, and is called only if they are
        read."""
        if self.by_scores and pattern is not None:
            return self.function(weight, keep, statistics, pattern, scores=scores())
        return self.function(weight, keep, statistics, pattern)


REFINEMENTS = {
    "dsnot": Refinement(function=dsnot, by_scores=True),
    "r2-dsnot": Refinement(function=r2_dsnot),
    "swaps": Refinement(function=swaps, needs=frozenset({"hessian"}), auto_from=4),  # O · I² beside O · I for a token
}


def find_refinement(name: str) -> Refinement | None:
    """The refinement of this name; None for "none". Raises Refusal for a name that the table does not have."""
    if name != "none" and name not in REFINEMENTS:
        raise Refusal(f"refine {name!r} {unknown(name, [*REFINEMENTS, 'none'])}")
    return REFINEMENTS.get(name)
