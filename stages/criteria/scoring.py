"""Scores of a matrix under a criterion by name: found, checked, whole or a few rows at a time. stages/README.md §2."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from espalier.stages.criteria.criterion import Criterion, checked_options, import_criterion, taken_by
from espalier.stages.criteria.equations import CRITERIA, _parts
from espalier.stages.errors import Refusal, unknown
from espalier.stages.statistics import InputStatistics


def find_criterion(name: str) -> Criterion:
    """The criterion of this name: a registered one, or a user's own as `package.module.function` or `module:function`.

    Raises Refusal naming the nearest one if there is none, or saying why the user's own cannot be had.
    """
    if name in CRITERIA:
        return CRITERIA[name]
    if "." in name or ":" in name:
        return import_criterion(name)
    raise Refusal(f"criterion {name!r} {unknown(name, CRITERIA)}; your own is module.function")


def check_criterion(name: str) -> str:
    """The name itself. Raises Refusal where find_criterion does."""
    find_criterion(name)
    return name


def check_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of criterion `name` with the types that it takes, from text or from values.

    Raises Refusal for an option that it does not have (with the nearest), that is of another type, or out of range.
    """
    criterion = find_criterion(name)
    if "seed" in options:
        raise Refusal(
            f"criterion {name}: option 'seed' is not yours to set: every layer has its own, from the run's seed"
        )
    return checked_options(name, criterion, options)


def score(
    name: str, weight: Tensor, statistics: InputStatistics, *, importance: Tensor | None = None, **options: Any
) -> Tensor:
    """Importance (O, I) float32 of every weight (O, I) under the criterion `name`; higher is more important.

    `importance` (O, I) is what a shadow says of the weight, for criteria that need it.
    Raises Refusal for an unknown criterion or option, without an importance that is needed, and for a score of another
    shape or that is not finite.
    """
    return _scorer(name, weight, statistics, options, importance)(slice(0, len(weight)))


def score_rows(
    name: str, weight: Tensor, statistics: InputStatistics, *, importance: Tensor | None = None, **options: Any
) -> Iterator[tuple[slice, Tensor]]:
    """The scores of `score`, a few rows at a time where rows allow it: (which rows, their scores).

    So that scores stay in the cache and no layer has a float32 copy. What a criterion needs of the layer as a whole,
    sums over its columns say, is computed once, before the first rows.
    """
    scores_of = _scorer(name, weight, statistics, options, importance)
    criterion = find_criterion(name)
    whole = not criterion.row_wise and criterion.prepare is None
    for rows in [slice(0, len(weight))] if whole else _parts(weight):
        yield rows, scores_of(rows)


def _scorer(
    name: str,
    weight_OI: Tensor,
    statistics: InputStatistics,
    options: Mapping[str, Any],
    importance_OI: Tensor | None = None,
) -> Callable[[slice], Tensor]:
    """A function from rows to their checked scores, with the preparation done."""
    criterion = find_criterion(name)
    options = checked_options(name, criterion, options)
    weight_OI = weight_OI.detach()
    prepared: dict[str, Tensor] = {}
    if criterion.prepare is not None:
        prepared = criterion.prepare(weight_OI, statistics, **taken_by(criterion.prepare, options))
    if criterion.from_shadow:
        prepared = prepared | {"importance_OI": _of_shadow(name, weight_OI, importance_OI)}
    options = taken_by(criterion.function, options)

    def scores_of(rows: slice) -> Tensor:
        part_OI = weight_OI[rows].contiguous()  # a copy only where the weight is stored transposed
        cut = {key: value[rows] if value.dim() == 2 else value for key, value in prepared.items()}
        changes = None if part_OI.is_inference() else part_OI._version
        scores = criterion.function(part_OI, statistics, **cut, **options)
        if changes is not None and part_OI._version != changes:
            raise Refusal(
                f"criterion {name}: changes the weight in place; let it make new tensors, as weight.abs() does"
            )
        if not isinstance(scores, Tensor) or scores.shape != part_OI.shape:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise Refusal(
                f"criterion {name}: scores are {got}, the weight {tuple(part_OI.shape)}; return one score a weight"
            )
        scores = scores.float()
        if not scores.sum().isfinite():
            raise Refusal(f"criterion {name}: scores are not finite; weights or calibration inputs overflow float32")
        return scores

    return scores_of


def _of_shadow(name: str, weight_OI: Tensor, importance_OI: Tensor | None) -> Tensor:
    if importance_OI is None:
        raise Refusal(f"criterion {name}: scores by a shadow, and there is none; give --shadow DIR")
    if importance_OI.shape != weight_OI.shape:
        raise Refusal(
            f"criterion {name}: the shadow's weight is {tuple(importance_OI.shape)}, the model's "
            f"{tuple(weight_OI.shape)}; give the shadow of this model"
        )
    return importance_OI.to(weight_OI.device)
