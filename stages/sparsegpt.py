"""SparseGPT: masks chosen while the surviving weights make up for those that went (2301.00774). stages/README.md §5.

With H⁻¹ = Uᵀ U (U upper triangular), columns are pruned from left to right. Pruning w_j costs w_j² / U_jj², and what
then minimises ‖X(W̃ − W)‖ over the columns still to come is w_k ← w_k − w_j / U_jj · U_jk for k > j.

Letters: O = output rows, I = input columns, B = columns of a stretch. Inside, matrices are transposed, (I, O): a
column of the weight is contiguous there.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from espalier.stages.errors import Refusal
from espalier.stages.masks import check_divisible, check_pattern, check_sparsity, keep_mask

MAX_DAMPING = 1.0  # share of the mean diagonal: more would say that the calibration data does not matter
FIRST_DAMPING = 1e-3  # the first retry of a damping of 0
COLUMN_BY_COLUMN = 16  # columns pruned one after the other; wider stretches are halved and joined by a matrix product
DOUBLE_UP_TO = 8192  # inputs whose Hessian is factored in float64 (two matrices of 0.5 GiB)
INVERTED_AT_ONCE = 128  # rows of a triangle that LAPACK inverts; larger ones are halved

log = logging.getLogger(__name__)

ChooseDropped = Callable[[int, int, Tensor], Tensor]


def inverse_factor(hessian: Tensor, damping: float = 0.01) -> Tensor:
    """U (I, I) float32, upper triangular with a positive diagonal: Uᵀ U = (H + λ · mean(diag H) · 1)⁻¹, λ = damping.

    Columns that saw no input (H_jj = 0) count with H_jj = 1. If that is not positive definite numerically, λ is raised
    tenfold, up to 1, and a warning logged. Linears that read the same input share one factor.
    Raises Refusal if H is not finite, or not positive semi-definite.
    """
    return factor_with_damping(hessian, damping)[0]


def factor_with_damping(hessian: Tensor, damping: float = 0.01) -> tuple[Tensor, float]:
    """`inverse_factor`, and the damping that it took.

    H reversed in both directions has a Cholesky factor L; L⁻¹ reversed is U. The usual way, H⁻¹ first and then its
    factor, takes twice the work and loses digits twice. Up to DOUBLE_UP_TO inputs L is found in float64: in float32 U
    is off by about 1e-4 where there are fewer tokens than channels, enough to decide a near tie otherwise, and with it
    much of the row. (L is far better conditioned than H: inverting it in float32 costs no digits that matter.)
    """
    check_damping(damping)
    precision = torch.float64 if len(hessian) <= DOUBLE_UP_TO else torch.float32
    reversed_II = hessian.flip(0, 1).to(precision)
    diagonal_I = reversed_II.diagonal()
    diagonal_I[diagonal_I == 0] = 1
    mean = float(diagonal_I.mean(dtype=torch.float64))
    added = 0.0
    while True:
        diagonal_I.add_((damping - added) * mean)
        added = damping
        lower_II, failed_at = torch.linalg.cholesky_ex(reversed_II)
        if int(failed_at) == 0 and bool(lower_II.diagonal().isfinite().all()):
            break
        damping = _raised(damping, hessian)
    del reversed_II, diagonal_I
    with torch.autocast(lower_II.device.type, enabled=False):  # it would multiply float32 matrices in bfloat16
        return _invert_lower(lower_II.float()).flip(0, 1), damping


def check_damping(damping: float) -> float:
    """The damping itself. Raises Refusal unless it is a share of the mean diagonal, from 0 to 1."""
    if not 0 <= damping <= MAX_DAMPING:  # also false of nan
        raise Refusal(f"damping {damping}: a share of the mean diagonal, at least 0 and at most 1; try 0.01")
    return damping


def _raised(damping: float, hessian: Tensor) -> float:
    """The damping to try after `damping` has failed. Raises Refusal if there is none, saying why."""
    inputs = len(hessian)
    if not bool(hessian.isfinite().all()):
        raise Refusal(f"SparseGPT: the Hessian over {inputs} inputs holds NaN or infinity; check the calibration data")
    if damping >= MAX_DAMPING:
        raise Refusal(
            f"SparseGPT: the Hessian over {inputs} inputs is not positive definite even with damping {damping:g}, "
            "so it is no sum of x xᵀ; check the calibration data, or use --criterion wanda"
        )
    raised = min(max(10 * damping, FIRST_DAMPING), MAX_DAMPING)
    log.warning("Hessian over %d inputs: not positive definite with damping %g; trying %g", inputs, damping, raised)
    return raised


def _invert_lower(lower_II: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, in its place: halves inverted, then joined by two products."""
    size = len(lower_II)
    if size <= INVERTED_AT_ONCE:
        identity = torch.eye(size, dtype=lower_II.dtype, device=lower_II.device)
        return lower_II.copy_(torch.linalg.solve_triangular(lower_II, identity, upper=False))
    half = size // 2
    upper_left, lower_right = _invert_lower(lower_II[:half, :half]), _invert_lower(lower_II[half:, half:])
    below = lower_II[half:, :half]
    below.copy_((lower_right @ below @ upper_left).neg_())
    return lower_II


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    keep: Tensor | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The pruned and updated weight (O, I) in its own dtype, and its keep mask, bool (O, I).

    Give one of: `sparsity` s, zeros chosen over all rows of each `block_size` columns; `pattern` (N, M), N kept of
    every M; `keep`, a mask (O, I) for which only the update is made.
    `hessian` is Σ x xᵀ (I, I) up to a factor; `factor` its `inverse_factor`, if it is at hand (`damping` goes unread).
    Only `sparsity` depends on `block_size`; the update itself is the same however it is cut.

    Of a block's n weights int(n · s) + 1 go (none if s = 0): the reference counts so (its threshold is inclusive), and
    one weight more or less changes many later choices in its row. Unlike the reference, ties do not add to that.
    Columns that saw no input (H_jj = 0) become zero and are the first to go. Where they are more than were asked for,
    the mask keeps to what was asked for, and some of what it keeps is zero.
    Raises Refusal as `keep_mask` and `inverse_factor` do, and if the update leaves float32.
    """
    if sum(choice is not None for choice in (sparsity, pattern, keep)) != 1:
        raise ValueError("give exactly one of sparsity, pattern and keep")
    if block_size < 1:
        raise Refusal(f"SparseGPT: block_size {block_size}: columns whose mask is chosen together, at least 1; try 128")
    inputs = weight.shape[1]
    dead_I = hessian.diagonal() == 0
    stretch, choose = inputs, None
    if sparsity is not None:
        stretch = block_size
        choose = _lowest_of_stretch(check_sparsity(sparsity))
    elif pattern is not None:
        check_divisible(inputs, check_pattern(pattern))
        stretch = pattern[1]
        choose = _lowest_of_groups(pattern)
    factor = inverse_factor(hessian, damping) if factor is None else factor
    weight_IO = weight.detach().T.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    weight_IO[dead_I.to(weight.device)] = 0
    drop_IO = torch.empty_like(weight_IO) if keep is None else (~keep.T).to(torch.float32)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        keep_IO = _prune_columns(weight_IO, drop_IO, factor.to(weight.device), stretch, choose)
    if not bool(weight_IO.sum().isfinite()):
        raise Refusal("SparseGPT: the updated weights are not finite; the weights or the Hessian are out of range")
    return weight_IO.T.to(weight.dtype).contiguous(), keep_IO.T.contiguous()


def _prune_columns(
    weight_IO: Tensor, errors_IO: Tensor, factor_II: Tensor, stretch: int, choose: ChooseDropped | None
) -> Tensor:
    """Prune `weight_IO` in place and update what survives; the keep mask, bool (I, O).

    `choose(start, end, costs_BO)` says which weights of a stretch go, once all columns before it are done. Without it
    `errors_IO` holds 1 where a weight goes and 0 elsewhere. It ends as the errors (w − q) / U_jj.
    """
    columns = _Columns(weight_IO, errors_IO, factor_II, stretch, choose)
    columns.solve(0, len(weight_IO))
    return columns.keep_IO


class _Columns:
    """The columns of a weight under way. One recursion is both the paper's loop over a block and its lazy update of
    the columns beyond: the left half is finished, its errors reach the right half in one matrix product, then comes
    the right half.

    A class and not functions inside one another: those would hold themselves, and all of these matrices with them,
    until the garbage collector comes.
    """

    def __init__(
        self, weight_IO: Tensor, errors_IO: Tensor, factor_II: Tensor, stretch: int, choose: ChooseDropped | None
    ) -> None:
        self.weight_IO, self.errors_IO, self.factor_II = weight_IO, errors_IO, factor_II
        self.stretch, self.choose = stretch, choose
        self.keep_IO = errors_IO == 0
        self.diagonal_I = factor_II.diagonal()
        self.scale = (1 / self.diagonal_I).tolist()

    def solve(self, start: int, end: int) -> None:
        """Finish columns start..end, which already have the errors of all columns before `start`."""
        stretches = -(-(end - start) // self.stretch)
        if stretches > 1:
            self.halves(self.solve, start, start + stretches // 2 * self.stretch, end)
            return
        if self.choose is not None:
            costs_BO = (self.weight_IO[start:end] / self.diagonal_I[start:end, None]).square_()
            drop_BO = self.choose(start, end, costs_BO)
            self.errors_IO[start:end] = drop_BO
            torch.logical_not(drop_BO, out=self.keep_IO[start:end])
        self.update(start, end)

    def update(self, start: int, end: int) -> None:
        """The same, where it is settled which weights go."""
        if end - start > COLUMN_BY_COLUMN:
            self.halves(self.update, start, (start + end) // 2, end)
        else:
            self.one_by_one(start, end)

    def halves(self, finish: Callable[[int, int], None], start: int, middle: int, end: int) -> None:
        weight_IO, factor_II = self.weight_IO, self.factor_II
        finish(start, middle)
        weight_IO[middle:end].addmm_(factor_II[start:middle, middle:end].T, self.errors_IO[start:middle], alpha=-1)
        finish(middle, end)

    def one_by_one(self, start: int, end: int) -> None:
        weight_IO, errors_IO, factor_II, scale = self.weight_IO, self.errors_IO, self.factor_II, self.scale
        for column in range(start, end):
            weight_O, error_O = weight_IO[column], errors_IO[column]
            error_O.mul_(weight_O)  # w − q: the weight itself where it goes, else 0
            weight_O.sub_(error_O)
            error_O.mul_(scale[column])
            weight_IO[column + 1 : end].addr_(factor_II[column, column + 1 : end], error_O, alpha=-1)


def _lowest_of_stretch(sparsity: float) -> ChooseDropped:
    def choose(start: int, end: int, costs_BO: Tensor) -> Tensor:
        weights = costs_BO.numel()
        zeros = int(weights * sparsity) + 1 if sparsity else 0
        if zeros >= weights:
            return torch.ones_like(costs_BO, dtype=torch.bool)
        return ~keep_mask(costs_BO, (zeros + 0.5) / weights, scope="matrix")  # half a weight: rounds to `zeros`

    return choose


def _lowest_of_groups(pattern: tuple[int, int]) -> ChooseDropped:
    def choose(start: int, end: int, costs_BO: Tensor) -> Tensor:
        return ~keep_mask(costs_BO.T.contiguous(), pattern=pattern).T

    return choose
