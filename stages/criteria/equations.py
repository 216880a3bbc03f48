"""Importance scores: pure functions of a weight and its input statistics. stages/README.md §2.

A new criterion is one function and one entry in CRITERIA; a user's own is found by its dotted name.
Letters: O = output rows (all of the layer's, or those scored now), I = input columns, 1 = broadcast.
"""

from collections.abc import Iterator
from typing import Annotated

import torch
from torch import Tensor

from espalier.stages.criteria.criterion import Criterion, Need, Rule
from espalier.stages.criteria.solvers import Share, solve_alps, solve_sparsegpt
from espalier.stages.statistics import InputStatistics

CPU_WEIGHTS = 1 << 17  # scored or summed at a time on a CPU: their scores stay in the cache
DEVICE_WEIGHTS = 1 << 25  # and elsewhere: a small part of the memory
FLOOR = 1e-30  # row and column norms below it count as it: no division by zero, and none that overflows

Exponent = Annotated[float, Rule("at least 0 and finite", lambda value: 0 <= value < float("inf"))]
Order = Annotated[float, Rule("1, 2, 3 or inf", lambda value: value in (1, 2, 3, float("inf")))]


def magnitude(weight_OI: Tensor, statistics: InputStatistics) -> Tensor:
    """|W_ij|. Needs no statistics."""
    return weight_OI.abs().float()


def wanda(weight_OI: Tensor, statistics: InputStatistics) -> Tensor:
    """|W_ij| · ‖X_j‖₂, the norm over all calibration tokens (Sun et al. 2023, 2306.11695, Eq. 1)."""
    return weight_OI.abs().float().mul_(statistics.norm.to(weight_OI.device))


def output_norms(weight_OI: Tensor, statistics: InputStatistics) -> dict[str, Tensor]:
    """‖Y_i‖₂ over all calibration tokens, (O, 1)."""
    return {"output_norm_O1": statistics.output_norm(weight_OI).to(weight_OI.device)[:, None]}


def owanda(weight_OI: Tensor, statistics: InputStatistics, *, output_norm_O1: Tensor) -> Tensor:
    """|W_ij| · ‖Y_i‖₂ (Symmetric Pruning, 2501.18980). Orders the weights of a row as magnitude does: it differs where
    rows are compared with each other, `scope="matrix"`."""
    return weight_OI.abs().float().mul_(output_norm_O1)


def symwanda(weight_OI: Tensor, statistics: InputStatistics, *, output_norm_O1: Tensor) -> Tensor:
    """|W_ij| · (‖X_j‖₂ + ‖Y_i‖₂) (Symmetric Pruning, 2501.18980), which minimises ‖X(W̃ − W)‖ + ‖(W̃ − W)Y‖."""
    return weight_OI.abs().float().mul_(statistics.norm.to(weight_OI.device) + output_norm_O1)


def _norms(weight_OI: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """‖W_i·‖_p of every row, (O,), and ‖W_·j‖_p of every column, (I,), float64, from a few rows at a time."""
    row_O = torch.empty(len(weight_OI), dtype=torch.float64, device=weight_OI.device)
    column_I = torch.zeros(weight_OI.shape[1], dtype=torch.float64, device=weight_OI.device)
    for rows in _parts(weight_OI):
        # Squares and cubes of small weights are below float32's range, not below float64's.
        part_OI = weight_OI[rows].abs().to(torch.float64 if p in (2, 3) else torch.float32)
        if p == float("inf"):
            row_O[rows] = part_OI.amax(1).double()
            column_I = torch.maximum(column_I, part_OI.amax(0).double())
            continue
        powers_OI = part_OI if p == 1 else part_OI.pow_(p)
        row_O[rows] = powers_OI.sum(1).double()
        column_I += powers_OI.sum(0)
    return (row_O.pow_(1 / p), column_I.pow_(1 / p)) if p in (2, 3) else (row_O, column_I)


def _sampled_sums(weight_OI: Tensor, ratio: float, seed: int) -> tuple[Tensor, Tensor]:
    """Σ_j |W_ij| and Σ_i |W_ij|, estimated: rows from a share `ratio` of the columns, columns from one of the rows.

    One draw of columns serves all rows, and one of rows all columns, so that little more than `ratio` of the weights
    is read. A sample of nothing but zeros says nothing about its row or column: those are summed in full.
    """
    generator = torch.Generator().manual_seed(seed)
    estimates = []
    for dim in (1, 0):
        size = weight_OI.shape[dim]
        chosen = torch.randperm(size, generator=generator)[: max(1, round(size * ratio))].sort().values
        sample = weight_OI.index_select(dim, chosen.to(weight_OI.device))
        estimate = _norms(sample, 1)[1 - dim].mul_(size / len(chosen))
        if len(unknown := (estimate == 0).nonzero()[:, 0]):
            estimate[unknown] = _norms(weight_OI.index_select(1 - dim, unknown), 1)[1 - dim]
        estimates.append(estimate)
    return estimates[0], estimates[1]


def _relative_factors(norms: tuple[Tensor, Tensor], statistics: InputStatistics, alpha: float) -> dict[str, Tensor]:
    """1 / ‖W_i·‖ (O, 1), and (Σx² / samples)^{α/2} without and with 1 / ‖W_·j‖ (I,), all float32."""
    row_O, column_I = (norm.clamp(min=FLOOR).reciprocal() for norm in norms)
    activation_I = (statistics.sum_sq / max(statistics.samples, 1)).pow(alpha / 2).to(row_O.device)
    return {
        "row_O1": row_O.float()[:, None],
        "column_I": (activation_I * column_I).float(),
        "activation_I": activation_I.float(),
    }


def sums(weight_OI: Tensor, statistics: InputStatistics, *, alpha: Exponent = 0.5) -> dict[str, Tensor]:
    """ria: relative to Σ_j |W_ij| of the row and Σ_i |W_ij| of the column."""
    return _relative_factors(_norms(weight_OI, 1), statistics, alpha)


def sampled_sums(
    weight_OI: Tensor, statistics: InputStatistics, *, alpha: Exponent = 0.5, ratio: Share = 0.1, seed: int = 0
) -> dict[str, Tensor]:
    """stochria: each sum estimated from a random share `ratio` of its terms (Symmetric Pruning, 2501.18980)."""
    return _relative_factors(_sampled_sums(weight_OI, ratio, seed), statistics, alpha)


def lp_norms(
    weight_OI: Tensor, statistics: InputStatistics, *, alpha: Exponent = 0.5, p: Order = 1.0
) -> dict[str, Tensor]:
    """lp-ria: relative to the ℓp norms of the row and of the column (Symmetric Pruning, 2501.18980)."""
    return _relative_factors(_norms(weight_OI, p), statistics, alpha)


def ria(
    weight_OI: Tensor, statistics: InputStatistics, *, row_O1: Tensor, column_I: Tensor, activation_I: Tensor
) -> Tensor:
    """(|W_ij| / Σ_i|W_ij| + |W_ij| / Σ_j|W_ij|) · ‖X_j‖₂^α (RIA, Zhang et al., ICLR 2024, Eq. 4).

    The norm enters as (Σx² / samples)^{α/2}, as in the authors' code: a factor for the whole layer. The sums come
    prepared: exact (ria), from samples (stochria), or as ℓp norms (lp-ria). A row or column of zeros scores zero.
    """
    return torch.addcmul(column_I, row_O1, activation_I).mul_(weight_OI.abs().float())


def inverse_diagonal(weight_OI: Tensor, statistics: InputStatistics, *, damping: Share = 0.01) -> dict[str, Tensor]:
    """1 / U_jj² of the upper Cholesky factor U of H⁻¹, (I,); 0 for a channel that no input ever reached."""
    diagonal_I = statistics.inverse_factor(damping).diagonal()
    alive_I = (statistics.sum_sq > 0).to(diagonal_I.device)
    return {"curvature_I": torch.where(alive_I, diagonal_I.square().reciprocal(), 0.0).to(weight_OI.device)}


def sparsegpt(weight_OI: Tensor, statistics: InputStatistics, *, curvature_I: Tensor) -> Tensor:
    """W_ij² / [H⁻¹]_jj² with U_jj, the Cholesky diagonal, for [H⁻¹]_jj (SparseGPT, 2301.00774, Eq. 3 and Algorithm 1).

    U_jj² is what is left of [H⁻¹]_jj once the columns before j are frozen. This is the choice of weights alone:
    espalier.stages.sparsegpt also moves the others to make up for them.
    """
    return weight_OI.float().square().mul_(curvature_I)


def temporal(weight_OI: Tensor, statistics: InputStatistics, *, importance_OI: Tensor) -> Tensor:
    """|q_ij|, the weight's average over its training run (Systematic Weight Evaluation, 2502.17071): what a shadow
    directory holds of it. Needs no statistics."""
    return importance_OI.float()


OUTPUTS: frozenset[Need] = frozenset({"outputs"})
HESSIAN: frozenset[Need] = frozenset({"hessian"})
IMPORTANCE: frozenset[Need] = frozenset({"importance"})
CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion(function=magnitude, row_wise=True),
    "wanda": Criterion(function=wanda, row_wise=True),
    "owanda": Criterion(function=owanda, prepare=output_norms, needs=OUTPUTS),
    "symwanda": Criterion(function=symwanda, prepare=output_norms, needs=OUTPUTS),
    "ria": Criterion(function=ria, prepare=sums),
    "stochria": Criterion(function=ria, prepare=sampled_sums),
    "lp-ria": Criterion(function=ria, prepare=lp_norms),
    "sparsegpt": Criterion(
        function=sparsegpt, prepare=inverse_diagonal, solve=solve_sparsegpt, scopes=(), needs=HESSIAN
    ),
    "alps": Criterion(
        function=wanda, row_wise=True, solve=solve_alps, exact=True, scopes=("matrix", "row"), needs=HESSIAN
    ),
    "temporal": Criterion(function=temporal, row_wise=True, needs=IMPORTANCE),
}


def _parts(weight_OI: Tensor) -> Iterator[slice]:
    """Rows in steps that suit the device."""
    weights = CPU_WEIGHTS if weight_OI.device.type == "cpu" else DEVICE_WEIGHTS
    step = max(1, weights // weight_OI.shape[1])
    for start in range(0, len(weight_OI), step):
        yield slice(start, min(start + step, len(weight_OI)))
