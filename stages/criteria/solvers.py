"""Criteria that choose the mask and also change the weights that stay: SparseGPT and ALPS, as a criterion is called.

Letters: O = output rows, I = input columns.
"""

from typing import Annotated

from torch import Tensor

from espalier.stages.alps import alps, solve
from espalier.stages.criteria.criterion import Rule, Target
from espalier.stages.sparsegpt import sparsegpt
from espalier.stages.statistics import InputStatistics

Share = Annotated[float, Rule("above 0 and at most 1", lambda value: 0 < value <= 1)]
Columns = Annotated[int, Rule("at least 1", lambda value: value >= 1)]


def solve_sparsegpt(
    weight_OI: Tensor,
    statistics: InputStatistics,
    target: Target,
    keep_OI: Tensor | None,
    *,
    damping: Share = 0.01,
    block_size: Columns = 128,
    update: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """SparseGPT whole: masks chosen in blocks of columns while the weights that stay make up for those that went.

    With `update=False` its masks alone, over weights as they were: a start for reconstruction.
    """
    moved, keep = sparsegpt(
        weight_OI,
        statistics.hessian,
        target.sparsity if keep_OI is None and target.pattern is None else None,
        target.pattern if keep_OI is None else None,
        block_size=block_size,
        keep=keep_OI,
        factor=statistics.inverse_factor(damping),
    )
    return keep, moved if update else None


def solve_alps(
    weight_OI: Tensor,
    statistics: InputStatistics,
    target: Target,
    keep_OI: Tensor | None,
    *,
    damping: Share = 0.003,
    update: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """ALPS whole: mask and values by ADMM on the inputs' Gram matrix, then the exact values on that mask. (Its scores
    are Wanda's: ADMM starts from those.)

    With `update=False` its masks alone, over weights as they were.
    """
    gram = statistics.gram
    assert gram is not None
    if keep_OI is not None:
        return keep_OI, solve(weight_OI, keep_OI, gram, damping, cross=statistics.cross) if update else None
    amount = target.sparsity if target.pattern is None else None
    moved, keep = alps(weight_OI, gram, amount, target.pattern, target.scope, damping, statistics.cross)
    return keep, moved if update else None
