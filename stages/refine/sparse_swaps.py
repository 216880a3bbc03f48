"""SparseSwaps: masks refined by exchanging weights, by their layer's exact error (2512.10922). stages/README.md §4.

Letters: O = output rows, R = rows worked on at a time, I = input columns, K = a row's shortlist of each kind,
F = 2K, the flips on it, N = groups of M neighbours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from espalier.stages.errors import Refusal
from espalier.stages.masks import check_divisible, check_pattern
from espalier.stages.refine.top_k import TopK
from espalier.stages.statistics import InputStatistics

CHUNK_ELEMENTS = 1 << 19  # weights of the rows worked on at a time
CACHE_ELEMENTS = 1 << 17  # of which so many at a time are looked through for a shortlist
ACCELERATOR_ELEMENTS = 1 << 26  # both of them on an accelerator
PANEL = 64  # rows of a matrix product on the CPU: always the same shape, so that a row's rounding is its own
MARGIN = 2.0**-20  # a swap must gain more than its rounding error, judged against the row's uncorrelated error


@torch.no_grad()
def swaps(
    weight: Tensor,
    keep: Tensor,
    statistics: InputStatistics,
    pattern: tuple[int, int] | None = None,
    *,
    rounds: int = 25,
    shortlist: int = 16,
    swaps_per_round: int = 16,
    exhaustive: int = 256,
) -> Tensor:
    """SparseSwaps: bool (O, I) with as many zeros in every row (every group of N:M) as `keep`, and a lower error.

    The error is exact: L = Σ_rows rᵀ G r, r = W∘(1 − M), G = Σ x xᵀ (statistics made with hessian=True). With
    c = G r, keeping a pruned i and pruning a kept j changes a row's error by
        Δ(i, j) = (W_i² G_ii − 2 W_i c_i) + (W_j² G_jj + 2 W_j c_j) − 2 W_i W_j G_ij.
    In a round each row shortlists the pruned and the kept weights with the smallest brackets, `shortlist` of each,
    takes the best pair of them, then the best of the rest with that swap accounted for exactly, up to
    `swaps_per_round` pairs, each only if Δ < 0; then c follows by columns of G. With a pattern (N, M) both weights
    share a group, and the shortlist holds the best pairs of so many groups.

    L falls with every swap, measured in float64 too: a swap must gain more than float32 could mistake.
    A row ends after `rounds`, or once no swap is found: with a pattern, then none helps; without one, then none helps
    in rows of up to `exhaustive` inputs, where all pairs are tried before a row ends, and none on the shortlist
    in wider ones. Rows do not depend on each other, nor on how many are worked on at a time.

    Raises ValueError if the statistics have no Gram matrix; Refusal for a pattern that does not fit.
    """
    gram_II = statistics.gram
    if gram_II is None:
        raise ValueError("swaps needs the Gram matrix: make the statistics with hessian=True")
    if min(shortlist, swaps_per_round) < 1:
        raise Refusal(f"shortlist {shortlist}, swaps_per_round {swaps_per_round}: both must be at least 1")
    if pattern is not None:
        check_divisible(weight.shape[-1], check_pattern(pattern))
    gram_II = gram_II.to(weight.device)
    columns = weight.shape[1]
    step = max(1, (CHUNK_ELEMENTS if weight.device.type == "cpu" else ACCELERATOR_ELEMENTS) // columns)
    better = keep.clone()
    for start in range(0, len(weight) if rounds > 0 else 0, step):
        rows = Rows(weight[start : start + step], keep[start : start + step], gram_II)
        search = Search(gram_II, pattern, shortlist, swaps_per_round, exhaustive)
        better[start : start + step] = search.run(rows, rounds)
    return better


class Rows:
    """The state of some rows: what flipping each weight (kept to pruned, or back) does to their errors.

    `step_RI`: what a flip adds to r: W where kept, −W where pruned. `twice_c_RI`: 2 G r.
    `not_pruned_RI`, `not_kept_RI`: 0, or +inf where the weight is kept, or pruned: added to costs, they bar weights.
    `caution_RI`: the least that a flip must gain. Rows are scaled by powers of two, which changes no decision.
    """

    def __init__(self, weight_RI: Tensor, keep_RI: Tensor, gram_II: Tensor) -> None:
        w_RI = weight_RI.float()
        diagonal_I = gram_II.diagonal().clamp_min(0)
        size_RI = w_RI.abs().mul_(diagonal_I.sqrt())  # √ of the error that pruning this weight alone makes
        _, exponent_R1 = torch.frexp(size_RI.amax(1, keepdim=True))
        scale_R1 = torch.ldexp(torch.ones_like(exponent_R1, dtype=torch.float32), -exponent_R1)
        w_RI = w_RI * scale_R1
        size_RI.mul_(scale_R1)
        gone_RI = w_RI * ~keep_RI
        self.step_RI = w_RI - 2 * gone_RI
        self.twice_c_RI = _product(2 * gone_RI, gram_II)
        self.not_pruned_RI = torch.zeros_like(w_RI).masked_fill_(keep_RI, torch.inf)
        self.not_kept_RI = torch.zeros_like(w_RI).masked_fill_(~keep_RI, torch.inf)
        total_R1 = (size_RI * ~keep_RI).square().sum(1, keepdim=True).sqrt()
        self.caution_RI = size_RI.mul_(MARGIN * total_R1)
        self.diagonal_I = diagonal_I

    def __len__(self) -> int:
        return len(self.step_RI)

    @property
    def keep_RI(self) -> Tensor:
        return self.not_pruned_RI != 0

    def cost(self, rows: slice | Tensor) -> Tensor:
        """What flipping each weight alone adds to its row's error, and the caution, (R, I)."""
        step_RI = self.step_RI[rows]
        return (step_RI * self.diagonal_I).add_(self.twice_c_RI[rows]).mul_(step_RI).add_(self.caution_RI[rows])

    def flip(self, flips_RF: Tensor, done_RF: Tensor, gram_II: Tensor) -> None:
        """Flip the weights in these columns where `done`: 2 c moves along columns of G."""
        step_RF = self.step_RI.gather(1, flips_RF)
        self.twice_c_RI += embedding_bag(flips_RF, gram_II, mode="sum", per_sample_weights=2 * step_RF * done_RF)
        row_N, place_N = done_RF.nonzero(as_tuple=True)
        column_N = flips_RF[row_N, place_N]
        self.step_RI[row_N, column_N] *= -1
        for bar_RI in (self.not_pruned_RI, self.not_kept_RI):
            bar_RI[row_N, column_N] = torch.where(bar_RI[row_N, column_N] == 0, torch.inf, 0.0)

    def only(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        for name in ("step_RI", "twice_c_RI", "not_pruned_RI", "not_kept_RI", "caution_RI"):
            setattr(self, name, getattr(self, name)[rows])


def _product(left_RI: Tensor, gram_II: Tensor) -> Tensor:
    """left @ gram; on the CPU a panel of rows at a time, the last one filled up with zeros."""
    if left_RI.device.type != "cpu":
        return left_RI @ gram_II
    result_RI = torch.empty_like(left_RI)
    for part_RI, out_RI in zip(left_RI.split(PANEL), result_RI.split(PANEL), strict=True):
        panel = torch.zeros(PANEL, left_RI.shape[1])
        panel[: len(part_RI)] = part_RI
        out_RI.copy_((panel @ gram_II)[: len(part_RI)])
    return result_RI


@dataclass(frozen=True, slots=True)
class Search:
    """How swaps are found and chosen."""

    gram_II: Tensor
    pattern: tuple[int, int] | None
    shortlist: int
    swaps_per_round: int
    exhaustive: int

    def run(self, rows: Rows, rounds: int) -> Tensor:
        """The rows' masks after at most so many rounds, bool (R, I). Rows that have ended are laid aside."""
        keep_RI = rows.keep_RI
        place_R = torch.arange(len(rows), device=keep_RI.device)
        for _ in range(rounds):
            going_R = self.round(rows)
            ended = int((~going_R).sum())
            if 4 * ended >= len(rows):
                keep_RI[place_R] = rows.keep_RI
                rows.only(going_R)
                place_R = place_R[going_R]
                if len(rows) == 0:
                    break
        keep_RI[place_R] = rows.keep_RI
        return keep_RI

    def round(self, rows: Rows) -> Tensor:
        """One round of all rows, in place; which rows found a swap, bool (R,)."""
        cost_RF, flips_RF = self.shortlists(rows)
        done_RF = self.choose(rows, cost_RF, flips_RF)
        idle_R = ~done_RF.any(1)
        if self.pattern is None and rows.step_RI.shape[1] <= self.exhaustive and idle_R.any():
            again = idle_R.nonzero()[:, 0]
            cost_RF[again], flips_RF[again] = self.exhaustive_shortlists(rows, again)
            done_RF[again] = self.choose(rows, cost_RF, flips_RF, again)
        rows.flip(flips_RF, done_RF, self.gram_II)
        return done_RF.any(1)

    def shortlists(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """The cost of each flip on the rows' shortlists and its column, (R, F): pruned weights first, then kept ones.

        Pairs that share a group have the same place in both halves. A place that holds nothing costs +inf.
        """
        step = max(1, CACHE_ELEMENTS // rows.step_RI.shape[1]) if rows.step_RI.device.type == "cpu" else len(rows)
        parts = [slice(start, start + step) for start in range(0, len(rows), step)]
        if self.pattern is not None:
            found = [self.group_shortlists(rows, part) for part in parts]
            return torch.cat([cost for cost, _ in found]), torch.cat([flips for _, flips in found])
        pruned, kept = TopK(self.shortlist), TopK(self.shortlist)
        for part in parts:
            cost_RI = rows.cost(part)
            pruned.add(cost_RI + rows.not_pruned_RI[part])
            kept.add(cost_RI.add_(rows.not_kept_RI[part]))
        (grow_RK, grown_RK), (prune_RK, pruned_RK) = pruned.take(), kept.take()
        return torch.cat([grow_RK, prune_RK], 1), torch.cat([grown_RK, pruned_RK], 1)

    def group_shortlists(self, rows: Rows, part: slice) -> tuple[Tensor, Tensor]:
        """The same from the best pair of every group."""
        assert self.pattern is not None
        group = self.pattern[1]
        cost_RI, step_RNM = rows.cost(part), rows.step_RI[part].unflatten(1, (-1, group))
        grow_RI, prune_RI = cost_RI + rows.not_pruned_RI[part], cost_RI + rows.not_kept_RI[part]
        block_NMM = (
            self.gram_II.unflatten(0, (-1, group)).unflatten(2, (-1, group)).diagonal(dim1=0, dim2=2).movedim(2, 0)
        )
        pair_RNMM = step_RNM[..., :, None] * step_RNM[..., None, :] * (2 * block_NMM)
        pair_RNMM += grow_RI.unflatten(1, (-1, group))[..., :, None]
        pair_RNMM += prune_RI.unflatten(1, (-1, group))[..., None, :]
        best_RN, place_RN = pair_RNMM.flatten(2).min(2)
        best = TopK(self.shortlist)
        best.add(best_RN)
        _, group_RK = best.take()
        place_RK = place_RN.gather(1, group_RK)
        grown_RK, pruned_RK = group_RK * group + place_RK // group, group_RK * group + place_RK % group
        cost_RF = torch.cat([grow_RI.gather(1, grown_RK), prune_RI.gather(1, pruned_RK)], 1)
        return cost_RF, torch.cat([grown_RK, pruned_RK], 1)

    def exhaustive_shortlists(self, rows: Rows, some: Tensor) -> tuple[Tensor, Tensor]:
        """The same for these rows from all pairs: each weight stands where its best pair puts it."""
        width = rows.step_RI.shape[1]
        pruned, kept = TopK(self.shortlist), TopK(self.shortlist)
        costs = []
        for part in some.split(max(1, CHUNK_ELEMENTS // width**2)):
            step_RI, cost_RI = rows.step_RI[part], rows.cost(part)
            grow_RI, prune_RI = cost_RI + rows.not_pruned_RI[part], cost_RI + rows.not_kept_RI[part]
            pair_RII = (2 * step_RI)[:, :, None] * self.gram_II
            pair_RII.mul_(step_RI[:, None, :]).add_(grow_RI[:, :, None]).add_(prune_RI[:, None, :])
            pruned.add(pair_RII.amin(2))
            kept.add(pair_RII.amin(1))
            costs.append((grow_RI, prune_RI))
        columns = [pruned.take()[1], kept.take()[1]]
        cost = [torch.cat(half).gather(1, at) for half, at in zip(zip(*costs, strict=True), columns, strict=True)]
        return torch.cat(cost, 1), torch.cat(columns, 1)

    def choose(self, rows: Rows, cost_RF: Tensor, flips_RF: Tensor, some: Tensor | None = None) -> Tensor:
        """Which flips of the shortlists to make, bool (R, F): the best pair, then the best with that one made, ..."""
        step_RI = rows.step_RI if some is None else rows.step_RI[some]
        if some is not None:
            cost_RF, flips_RF = cost_RF[some], flips_RF[some]
        places = flips_RF.shape[1] // 2
        step_RF = step_RI.gather(1, flips_RF)
        both_RFF = self.gram_II[flips_RF[:, :, None], flips_RF[:, None, :]]  # what two flips cost beyond each alone
        both_RFF.mul_(2 * step_RF[:, :, None]).mul_(step_RF[:, None, :])
        pair_RKK = both_RFF[:, :places, places:]
        if self.pattern is not None:
            other_KK = ~torch.eye(places, dtype=torch.bool, device=cost_RF.device)
            pair_RKK = pair_RKK.masked_fill(other_KK, torch.inf)
        cost_RF = cost_RF.clone()
        done_RF = torch.zeros_like(flips_RF, dtype=torch.bool)
        every_R = torch.arange(len(flips_RF), device=flips_RF.device)
        for _ in range(min(self.swaps_per_round, places)):
            best_R, place_R = (cost_RF[:, :places, None] + pair_RKK + cost_RF[:, None, places:]).flatten(1).min(1)
            won_R = best_R < 0
            if not won_R.any():
                break
            row_N, flip_N2 = every_R[won_R], torch.stack([place_R // places, places + place_R % places], 1)[won_R]
            cost_RF[row_N] += both_RFF[row_N[:, None], flip_N2].sum(1)
            cost_RF[row_N[:, None], flip_N2] = torch.inf
            done_RF[row_N[:, None], flip_N2] = True
        return done_RF
