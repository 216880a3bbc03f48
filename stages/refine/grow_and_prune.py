"""Masks refined by a row's expected error: DSnoT and R²-DSnoT. stages/README.md §4.

Each takes a keep mask and gives another with exactly as many zeros in every row, or in every group of N:M.
Letters: O = output rows, R = rows worked on at a time, I = input columns, K = candidates of a row, M = a group.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from espalier.stages.criteria.scoring import score
from espalier.stages.errors import Refusal
from espalier.stages.masks import check_divisible, check_pattern
from espalier.stages.refine.top_k import TopK
from espalier.stages.statistics import InputStatistics

CHUNK_ELEMENTS = 1 << 17  # weights worked on at a time, so that the copies stay in the cache
FIRST_CYCLES = 24  # candidates looked for at first: 1 to 3 cycles on average where 256 wide, 10 where 11008 wide
BATCH_ELEMENTS = 1 << 21  # weights whose candidates are sorted and paired at a time
ACCELERATOR_ELEMENTS = 1 << 26  # both of them on an accelerator: few launches, bounded memory
STEEPEST = 1e30  # bounds 1 / Var of a channel that never varies, so that 0 / 0 stays 0
LEAST = torch.finfo(torch.float32).tiny
Relative = Literal["grow", "prune", "both", "neither"]


@dataclass(frozen=True, slots=True)
class Ranking:
    """The two orders of a method. A row's ε keeps its sign while the row goes on, so both are known before cycle 1.

    `grow(w_RI, side_R1, rows_R)`: lower grows first; 0 where w is 0 (the kept weights are passed as 0). `side` is the
    sign of each row's ε. May change w_RI.
    `prune(w, side_R1, rows_R, columns)`: only what is negative may be pruned, the smallest magnitude first; for all
    columns (`slice(None)`) or for those of an index (R, C).
    """

    grow: Callable[[Tensor, Tensor, Tensor], Tensor]
    prune: Callable[[Tensor, Tensor, Tensor, slice | Tensor], Tensor]


@torch.no_grad()
def dsnot(
    weight: Tensor,
    keep: Tensor,
    statistics: InputStatistics,
    pattern: tuple[int, int] | None = None,
    *,
    cycles: int = 50,
    threshold: float = 0.1,
    start: str = "wanda",
    scores: Tensor | None = None,
) -> Tensor:
    """DSnoT (Zhang et al. 2023, 2310.08915): bool (O, I) with the zeros of `keep`, row by row, in better places.

    A row's expected error is ε = Σ over its pruned j of g_j, with g_j = W_j · E[X_j]. A cycle grows the pruned weight
    with the largest sign(ε) · g_j / Var(X_j), prunes the kept weight with the smallest |W_j| · ‖X_j‖₂ among those with
    g of the sign opposite to ε, and is accepted while |ε| was above `threshold` before it and ε has the sign that it
    began with after it. The first rejection ends the row; at most `cycles`; no weight moves twice.
    With a `pattern` (N, M) the weight to prune is the one with the smallest start score in the grown weight's group,
    whatever its sign: the start score is that of the criterion `start`, or `scores` (O, I). Without a pattern neither
    plays a part.

    Units as in the reference code: E[X_j] is Σ x_j / samples, a sum over a sample's tokens, and so is ε, and so is
    `threshold`; Var is the token-weighted mean of the variance within samples.
    Departures: a row that has stopped stays as it is (the reference goes on scattering, and breaks narrow N:M layers);
    where a group of N:M has nothing left to prune, its pruned weights are passed over; a row out of candidates stops.
    """
    if pattern is not None and scores is None and start != "wanda":
        scores = score(start, weight, statistics)
    slope_I, norm_I = _slope(statistics).to(weight.device), statistics.norm.to(weight.device)
    signed_I = norm_I * statistics.mean_per_sample.to(weight.device).sign()

    def grow(w_RI: Tensor, side_R1: Tensor, rows_R: Tensor) -> Tensor:
        return w_RI.mul_(-slope_I).mul_(side_R1)

    def prune(w: Tensor, side_R1: Tensor, rows_R: Tensor, columns: slice | Tensor) -> Tensor:
        if isinstance(columns, slice):  # no pattern
            return (w * signed_I).mul_(side_R1).add_(0.0)  # -0 + 0 = +0: what is 0 has no sign
        if scores is None:
            return w.abs().mul_(-norm_I[columns])
        return -scores[rows_R].gather(1, columns).float()

    return _refined(weight, keep, statistics, pattern, Ranking(grow, prune), cycles, threshold)


@torch.no_grad()
def r2_dsnot(
    weight: Tensor,
    keep: Tensor,
    statistics: InputStatistics,
    pattern: tuple[int, int] | None = None,
    *,
    cycles: int = 50,
    threshold: float = 0.1,
    relative: Relative = "grow",
    alpha: float = 0.5,
    gamma_grow: float = 1e-3,
    gamma_prune: float = 1e-3,
    p: float = 2,
) -> Tensor:
    """R²-DSnoT (2501.18980): as `dsnot`, with relative weights and a regularised boundary; bool (O, I).

    With the relative weight D_ij = W_ij / Σ_i |W_ij| + W_ij / Σ_j |W_ij|, a cycle grows the pruned weight with the
    largest sign(ε_i) · D_ij · E[X_j] / Var(X_j) + `gamma_grow` · n_ij, and prunes the kept weight with the smallest
    |W_ij| · ‖X_j‖₂^`alpha` + `gamma_prune` · n_ij among those with g of the sign opposite to ε. `relative` says where
    D_ij stands for W_ij. All the rest is DSnoT's.

    Choices where the paper leaves one open. n_ij = |W_ij| / ‖W_i‖_p, the candidate's share of its row's p-norm
    (`p` >= 1 or inf): the norm of the row alone would be the same for all candidates. With 1e-3 the two terms decide
    next to nothing; `gamma_grow` of 10 to 100 lowers the error of trained layers by up to 2 %, their model's perplexity
    not reliably. A weight whose order to grow is not positive is not grown. The sign condition and this metric hold
    inside the groups of N:M too, where DSnoT asks for neither: so 2:4 masks of trained weights stay as good as their
    start, where DSnoT's get worse by half to three times. What gains is alpha below 1: the error falls by 0.3 to 0.9 %
    below DSnoT's; relative growing or not hardly matters.
    Raises Refusal for alpha or gamma below 0, p below 1, or a `relative` that is none of the four.
    """
    _check(relative, alpha, gamma_grow, gamma_prune, p)
    device = weight.device
    slope_I, scale_I = _slope(statistics).to(device), statistics.norm.pow(alpha).to(device)
    side_I = statistics.mean_per_sample.to(device).sign()
    share_I, share_O1, power_O1 = _shares(weight, p)

    def grow(w_RI: Tensor, side_R1: Tensor, rows_R: Tensor) -> Tensor:
        order_RI = w_RI * -slope_I
        if relative in ("grow", "both"):
            order_RI.mul_(share_I + share_O1[rows_R])
        return order_RI.mul_(side_R1).sub_(w_RI.abs().mul_(gamma_grow * power_O1[rows_R]))

    def prune(w: Tensor, side_R1: Tensor, rows_R: Tensor, columns: slice | Tensor) -> Tensor:
        metric = w.abs().mul_(scale_I[columns])
        if relative in ("prune", "both"):
            metric.mul_(share_I[columns] + share_O1[rows_R])
        metric.add_(w.abs().mul_(gamma_prune * power_O1[rows_R]))
        return metric.copysign_((w * side_I[columns]).mul_(side_R1).add_(0.0))

    return _refined(weight, keep, statistics, pattern, Ranking(grow, prune), cycles, threshold)


def _check(relative: str, alpha: float, gamma_grow: float, gamma_prune: float, p: float) -> None:
    if relative not in get_args(Relative):
        raise Refusal(f"relative {relative!r}: it is one of {', '.join(get_args(Relative))}")
    for name, value in (("alpha", alpha), ("gamma_grow", gamma_grow), ("gamma_prune", gamma_prune)):
        if not 0 <= value < float("inf"):
            raise Refusal(f"{name} {value}: it must be a finite number of at least 0")
    if not p >= 1:
        raise Refusal(f"p {p}: the order of a norm must be at least 1; try 2")


def _shares(weight: Tensor, p: float) -> tuple[Tensor, Tensor, Tensor]:
    """1 / Σ_i |W_ij| (I,), 1 / Σ_j |W_ij| (O, 1) and 1 / ‖W_i‖_p (O, 1), float32; a sum of 0 counts as the least float.

    The absolute weights are made a few rows at a time; column sums are taken over the chunks in float64.
    """
    column_I = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    row_O1 = torch.empty(len(weight), 1, device=weight.device)
    power_O1 = torch.empty_like(row_O1)
    for rows in _slices(len(weight), _chunk(weight, CHUNK_ELEMENTS)):
        size_RI = weight[rows].float().abs()
        column_I += torch.ones(1, len(size_RI), device=weight.device).mm(size_RI)[0]
        row_O1[rows] = size_RI.sum(1, keepdim=True)
        power_O1[rows] = torch.linalg.vector_norm(size_RI, p, dim=1, keepdim=True)
    for sums in (row_O1, power_O1):
        sums.clamp_(LEAST).reciprocal_()
    return column_I.float().clamp_min(LEAST).reciprocal(), row_O1, power_O1


def _slope(statistics: InputStatistics) -> Tensor:
    """E[X_j] / Var(X_j), (I,) float32; 0 for a channel that is always 0."""
    slope_I = statistics.mean_per_sample.double() / statistics.variance.double().clamp_min(1e-300)
    return slope_I.clamp(-STEEPEST, STEEPEST).float()


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _chunk(weight: Tensor, elements: int) -> int:
    """How many rows hold about so many weights."""
    return max(1, (elements if weight.device.type == "cpu" else ACCELERATOR_ELEMENTS) // weight.shape[1])


def _refined(
    weight: Tensor,
    keep: Tensor,
    statistics: InputStatistics,
    pattern: tuple[int, int] | None,
    ranking: Ranking,
    cycles: int,
    threshold: float,
) -> Tensor:
    """The mask after DSnoT's cycles in these orders. Rows do not depend on each other, so neither on the chunks."""
    if pattern is not None:
        check_divisible(weight.shape[-1], check_pattern(pattern))
    refined = keep.clone()
    if cycles < 1 or (pattern is not None and pattern[0] == pattern[1]):
        return refined
    mean_I = statistics.mean_per_sample.to(weight.device)
    for batch in _slices(len(weight), _chunk(weight, BATCH_ELEMENTS)):
        rows_B = torch.arange(batch.start, batch.stop, device=weight.device)
        going_B = torch.ones_like(rows_B, dtype=torch.bool)
        for most in (min(FIRST_CYCLES, cycles), cycles):
            rows_B = rows_B[going_B]
            if len(rows_B) == 0:
                break
            whole = len(rows_B) == batch.stop - batch.start
            w_BI, kept_BI = (weight[batch], keep[batch]) if whole else (weight[rows_B], keep[rows_B])
            grow_BK, prune_BK, real_BK, accept_BK = _cycles(
                w_BI, kept_BI, mean_I, ranking, rows_B, most, threshold, pattern
            )
            place, cycle = accept_BK.nonzero(as_tuple=True)
            refined[rows_B[place], grow_BK[place, cycle]] = True
            refined[rows_B[place], prune_BK[place, cycle]] = False
            if most == cycles:
                break
            going_B = (accept_BK == real_BK).all(1)  # no pair rejected: there may be more
    return refined


def _cycles(
    w_BI: Tensor,
    kept_BI: Tensor,
    mean_I: Tensor,
    ranking: Ranking,
    rows_B: Tensor,
    cycles: int,
    threshold: float,
    pattern: tuple[int, int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The columns to grow and to prune in each cycle, whether there are any, whether it takes place: four (B, K)."""
    if pattern is None:
        error_B1, grow_BK, prune_BK, real_BK = _pairs(w_BI, kept_BI, mean_I, ranking, rows_B, cycles)
    else:
        error_B1, grow_BK, prune_BK, real_BK = _pairs_in_groups(w_BI, kept_BI, mean_I, ranking, rows_B, cycles, pattern)
    change_BK = w_BI.gather(1, prune_BK).float() * mean_I[prune_BK] - w_BI.gather(1, grow_BK).float() * mean_I[grow_BK]
    after_BK = torch.cat([error_B1, change_BK], 1).cumsum(1)
    willing_BK = (after_BK[:, :-1].abs() > threshold) & (after_BK[:, 1:].sign() == error_B1.sign())
    return grow_BK, prune_BK, real_BK, (real_BK & willing_BK).to(torch.uint8).cumprod(1).bool()


def _pairs(
    w_BI: Tensor, kept_BI: Tensor, mean_I: Tensor, ranking: Ranking, rows_B: Tensor, cycles: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ε (B, 1), the columns to grow and to prune in each cycle, and whether there are any: three (B, K)."""
    grown, pruned = TopK(cycles, last=-LEAST), TopK(cycles, last=-1)
    errors = []
    for part in _slices(len(w_BI), _chunk(w_BI, CHUNK_ELEMENTS)):
        w_RI, kept_RI = w_BI[part].float(), kept_BI[part]
        gone_RI = _only(w_RI, ~kept_RI)
        error_R1 = (gone_RI * mean_I).sum(1, keepdim=True)
        side_R1 = error_R1.sign()
        # A row has stopped before it runs out of weights on ε's side, so what is not negative need not be a candidate.
        grown.add(ranking.grow(gone_RI, side_R1, rows_B[part]))
        # As integers, negative floats ascend from the smallest magnitude; kept & positive, or pruned, is no candidate.
        pruned.add(ranking.prune(w_RI, side_R1, rows_B[part], slice(None)).view(torch.int32).mul_(kept_RI))
        errors.append(error_R1)
    (grown_BK, grow_BK), (pruned_BK, prune_BK) = grown.take(), pruned.take()
    return torch.cat(errors), grow_BK, prune_BK, (grown_BK <= -LEAST) & (pruned_BK < 0)


def _pairs_in_groups(
    w_BI: Tensor,
    kept_BI: Tensor,
    mean_I: Tensor,
    ranking: Ranking,
    rows_B: Tensor,
    cycles: int,
    pattern: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same where both weights of a pair share a group: the t-th grown of a group goes with its t-th to prune."""
    keep, group = pattern
    grown = TopK(cycles * -(-(group - keep) // keep))  # so many hold `cycles` that find a partner
    errors = []
    infinity = torch.tensor(torch.inf).view(torch.int32)
    for part in _slices(len(w_BI), _chunk(w_BI, CHUNK_ELEMENTS)):
        w_RI, kept_RI = w_BI[part].float(), kept_BI[part]
        gone_RI = _only(w_RI, ~kept_RI)
        errors.append((gone_RI * mean_I).sum(1, keepdim=True))
        grow_RI = ranking.grow(gone_RI, errors[-1].sign(), rows_B[part])
        grown.add(grow_RI.add_((kept_RI * infinity).view(torch.float32)))
    error_B1 = torch.cat(errors)
    grown_BK, grow_BK = grown.take()
    group_BK = grow_BK // group
    turn_BK = _turns(group_BK).clamp_(max=group - 1)
    member_BKM = (group_BK * group)[:, :, None] + torch.arange(group, device=w_BI.device)
    member_BC = member_BKM.flatten(1)
    prune_BC = ranking.prune(w_BI.gather(1, member_BC).float(), error_B1.sign(), rows_B, member_BC)
    keys_BKM = (prune_BC.view(torch.int32) * kept_BI.gather(1, member_BC)).view(member_BKM.shape)
    keys_BKM, order_BKM = keys_BKM.sort(dim=-1, stable=True)
    prune_BK = member_BKM.gather(2, order_BKM.gather(2, turn_BK[:, :, None]))[:, :, 0]
    real_BK = (grown_BK < torch.inf) & (keys_BKM.gather(2, turn_BK[:, :, None])[:, :, 0] < 0)
    first_BK = (~real_BK).to(torch.uint8).argsort(dim=1, stable=True)[:, :cycles]
    return error_B1, grow_BK.gather(1, first_BK), prune_BK.gather(1, first_BK), real_BK.gather(1, first_BK)


def _turns(group_BK: Tensor) -> Tensor:
    """How many entries of its row before it are equal to each entry, (B, K)."""
    ordered_BK, order_BK = group_BK.sort(dim=1, stable=True)
    place_BK = torch.arange(group_BK.shape[1], device=group_BK.device).expand_as(group_BK)
    repeats_BK = torch.nn.functional.pad(ordered_BK[:, 1:] == ordered_BK[:, :-1], (1, 0))
    first_BK = (place_BK * ~repeats_BK).cummax(1).values  # where the run of equals begins
    return torch.empty_like(group_BK).scatter_(1, order_BK, place_BK - first_BK)


def _only(values_RI: Tensor, chosen_RI: Tensor) -> Tensor:
    """The values that are chosen and 0 elsewhere. As integers: ten times as fast as a masked fill."""
    return (values_RI.view(torch.int32) * chosen_RI).view(torch.float32)
