"""ALPS: mask and values of a layer found together, by ADMM, then the exact values on that mask (2406.07831).

Minimised is ‖X (W̃ − W)ᵀ‖² over W̃ with so many zeros, from the Gram matrix G = Σ x xᵀ alone. With
H = G + λ · mean(diag G) · 1, d = √diag H, everything is scaled to a unit diagonal: H ← H / (d dᵀ), B₀ = W · d, so that
one step size suits all channels. ADMM splits W̃ into B, which is free, and D, which has the zeros:

    B ← argmin tr((B − B₀) H (B − B₀)ᵀ) + ρ‖B − D + V/ρ‖² = B₀ + (ρ(D − B₀) − V) (H + ρ1)⁻¹
    B̂ = α B + (1 − α) D                              over-relaxed
    M ← the largest of |B̂ + c V/ρ|                   the mask
    D ← M ∘ (B̂ + v V/ρ);     V ← V + τρ(B̂ − D)

and conjugate gradients on what is kept end it.

Where the layer reads other inputs X̃ than the dense one, X, a cross Gram matrix C = Σ x̃ xᵀ beside G = Σ x̃ x̃ᵀ lets it
aim at the dense output: ‖X̃ W̃ᵀ − X Wᵀ‖². The damping still pulls to W, not to 0. All that changes is a constant added to
the gradient: with S = W (C − G)ᵀ / d it is (B₀ − B) H + S, so ρ(D − B₀) − V becomes ρ(D − B₀) − V + S above.

The paper has α = c = v = τ = 1 and a ρ that grows with what the support still changes, over up to 300 steps of one
eigendecomposition. Here ρ stays, so that one Cholesky factor serves all steps, and c falls instead, from above 1 to
below: what a larger ρ does to the choice, where V counts less beside B. α, c, v and τ move linearly over 10 steps. The
summed error of the layers of two trained models is within 1 % of what four values of ρ and 16 steps gave, which was
within 1 % of 20 steps with a ρ each (50 %, 70 %, 2:4), for half the products and a fourth of the factors.

Letters: O = output rows, I = input columns.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from espalier.stages.errors import Refusal
from espalier.stages.masks import Scope, check_divisible, check_pattern, check_sparsity, keep_mask
from espalier.stages.sparsegpt import check_damping

PANEL = 128  # columns of the Hessian that are inverted at a time
RHO = 0.26  # beside a Hessian with a unit diagonal
STEPS = 10
RELAXATION = (1.4, 1.3)  # α, at the first step and at the last
IN_MASK = (1.3, 0.3)  # c
IN_VALUES = (0.7, 0.3)  # v
DUAL_STEP = (0.8, 1.5)  # τ
FIRST_DUAL = 1.3  # V / ρ at the start, of what the first mask drops
LAST_STEPS = 10  # of conjugate gradients behind ADMM, at most;
LAST_GAIN = 0.005  # share of the error that further ones must promise to take
MOST_STEPS = 200  # of conjugate gradients where the values alone are looked for
LOOKED_AT = 10  # steps between two looks at whether all rows are done: an accelerator's host waits for each
RESIDUAL = 1e-6  # of a row's gradient, beside that of its start with no weight kept: where conjugate gradients end


def alps(
    weight: Tensor,
    gram: Tensor,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    scope: Scope = "matrix",
    damping: float = 0.01,
    cross: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The pruned weight (O, I) in its own dtype, with the best values for its mask, and that keep mask, bool (O, I).

    Give one of `sparsity` s, int(O · I · s) zeros in the matrix or int(I · s) in each row, by `scope`; and `pattern`
    (N, M), N kept of every M inputs. `gram` is Σ x xᵀ (I, I) up to a factor, `damping` λ;
    `cross` Σ x̃ xᵀ (I, I) up to the same factor, x̃ the inputs that `gram` is of and x those whose output is wanted.
    Columns that saw no input (G_jj = 0) go first; those that stay keep their values, which nothing can judge.
    Raises Refusal as `keep_mask` does, for a Gram matrix that is not finite, and if the values leave float32.
    """
    if (sparsity is None) == (pattern is None):
        raise ValueError("give one of sparsity and pattern")
    if pattern is not None:
        check_divisible(weight.shape[1], check_pattern(pattern))
    elif sparsity is not None:
        check_sparsity(sparsity)

    def largest(sizes_OI: Tensor) -> Tensor:
        return keep_mask(sizes_OI, sparsity, pattern, scope if pattern is None else "row")

    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        problem = _Scaled("ALPS", weight, gram, damping, cross)
        if problem.seen:
            keep_OI, values_OI = _admm(problem, largest(problem.dense_OI.abs()), largest)
            values_OI = _conjugate_gradients(problem, values_OI, keep_OI, LAST_STEPS, LAST_GAIN)
        else:
            keep_OI, values_OI = largest(weight.float().abs()), problem.dense_OI
        return problem.unscaled(values_OI, keep_OI), keep_OI


def solve(
    weight: Tensor,
    keep: Tensor,
    gram: Tensor,
    damping: float = 0.01,
    steps: int = MOST_STEPS,
    cross: Tensor | None = None,
) -> Tensor:
    """The values (O, I), in the weight's dtype, that minimise ‖X (W̃ − W)ᵀ‖² among those that are zero where `keep` is
    False: least squares on each row's support, by conjugate gradients from the weight as it is, masked.

    `gram`, `damping` and `cross` as for `alps`. Its error, which counts the damping, is at most the masked weight's.
    Ends where the residual is a millionth of what it was, or after `steps` steps. Raises Refusal as `alps` does.
    """
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        problem = _Scaled("solve", weight, gram, damping, cross)
        values_OI = _conjugate_gradients(problem, problem.dense_OI * keep, keep, steps)
        return problem.unscaled(values_OI, keep)


class _Scaled:
    """The damped Hessian (I, I) with a unit diagonal, and the dense weight in its units, (O, I), both float32.

    `asked` is what refusals name. `shift_OI` is what other targets than the dense weight's own add to the gradient."""

    def __init__(self, asked: str, weight: Tensor, gram: Tensor, damping: float, cross: Tensor | None) -> None:
        check_damping(damping)
        diagonal_I = gram.diagonal()
        mean = float(diagonal_I.mean(dtype=torch.float64))
        if not 0 <= mean < float("inf"):  # also false of nan
            raise Refusal(
                f"{asked}: the Gram matrix over {len(gram)} inputs holds NaN or infinity; check the calibration data"
            )
        self.asked, self.weight, self.seen = asked, weight.detach(), mean > 0
        self.live_I = (diagonal_I > 0).to(weight.device)
        scale_I = torch.where(diagonal_I > 0, diagonal_I.double() + damping * mean, 1.0).sqrt()
        inverse_I = scale_I.reciprocal().float()
        self.scale_I = scale_I.float().to(weight.device)
        self.dense_OI = self.weight.float() * (self.scale_I * self.live_I)
        self.shift_OI: Tensor | None = None
        if cross is not None:
            apart_II = torch.sub(cross, gram).to(weight.device)
            self.shift_OI = (self.weight.float() @ apart_II.T).div_(self.scale_I)
            del apart_II  # before there is a Hessian: three matrices of that size beside the cross Gram are enough
            if not bool(self.shift_OI.sum().isfinite()):
                raise Refusal(
                    f"{asked}: the cross Gram matrix over {len(gram)} inputs holds NaN or infinity; check the "
                    "calibration data"
                )
        self._gram, self._inverse_I = gram, inverse_I

    def hessian(self, diagonal: float = 1.0) -> Tensor:
        """H (I, I), or with that on its diagonal, made anew: so that beside the Gram matrix no more than one matrix of
        its size need be there at a time."""
        hessian_II = (self._gram.float() * self._inverse_I[:, None]).mul_(self._inverse_I).to(self.weight.device)
        hessian_II.diagonal().fill_(diagonal)
        return hessian_II

    def gradient(self, values_OI: Tensor, hessian_II: Tensor) -> Tensor:
        """Half of what the error falls by along each value: (B₀ − B) H + S, (O, I)."""
        away_OI = self.dense_OI - values_OI
        return away_OI @ hessian_II if self.shift_OI is None else self.shift_OI.addmm(away_OI, hessian_II)

    def unscaled(self, values_OI: Tensor, keep_OI: Tensor) -> Tensor:
        """Those values as weights: +0 where they are not kept, as they were in columns that saw no input."""
        found_OI = torch.where(self.live_I, values_OI / self.scale_I, self.weight.float())
        found_OI = torch.where(keep_OI, found_OI, 0.0).to(self.weight.dtype)
        if not bool(found_OI.sum(dtype=torch.float32).isfinite()):
            raise Refusal(
                f"{self.asked}: the values found are not finite; the weights or the Gram matrix are out of range"
            )
        return found_OI


def _admm(problem: _Scaled, keep_OI: Tensor, largest: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The mask and values that ADMM ends with, from the mask that it starts with. V is kept in units of ρ.

    Every step reuses the same four matrices (O, I): fresh ones cost as much as the arithmetic on them.
    """
    dense_OI = problem.dense_OI
    inverse_II = _inverse(problem.hessian(1 + RHO)).mul_(RHO)
    values_OI = dense_OI * keep_OI
    dual_OI = torch.sub(dense_OI, values_OI).mul_(FIRST_DUAL)
    pull_OI, free_OI = torch.empty_like(dense_OI), torch.empty_like(dense_OI)
    for step in range(STEPS):
        share = step / max(1, STEPS - 1)
        schedules = (RELAXATION, IN_MASK, IN_VALUES, DUAL_STEP)
        relaxation, in_mask, in_values, dual_step = (first + (last - first) * share for first, last in schedules)
        torch.sub(values_OI, dual_OI, out=pull_OI).sub_(dense_OI)
        if problem.shift_OI is not None:
            pull_OI.add_(problem.shift_OI, alpha=1 / RHO)
        torch.addmm(dense_OI, pull_OI, inverse_II, out=free_OI)
        torch.lerp(values_OI, free_OI, relaxation, out=free_OI)
        keep_OI = largest(torch.add(free_OI, dual_OI, alpha=in_mask, out=pull_OI).abs_())
        torch.add(free_OI, dual_OI, alpha=in_values, out=values_OI).mul_(keep_OI)
        dual_OI.add_(free_OI.sub_(values_OI), alpha=dual_step)
    return keep_OI, values_OI


def _inverse(shifted_II: Tensor) -> Tensor:
    """(H + ρ1)⁻¹ in the place of H + ρ1. H has a unit diagonal and is positive semi-definite, so float32 serves.

    Panel by panel (K) the matrix is swept: with P = A_KK⁻¹, A ← A − A_:K P A_K:, A_:K ← A_:K P, A_KK ← −P; after all of
    them it is −A⁻¹. Only blocks on the diagonal and below are kept. As many operations as LAPACK's factor and inverse
    of it, for which torch makes another matrix of this size.
    """
    starts = range(0, len(shifted_II), PANEL)
    panels = [slice(start, start + PANEL) for start in starts]
    failed = torch.zeros((), dtype=torch.int64, device=shifted_II.device)  # there: the host waits once
    for start, panel in zip(starts, panels, strict=True):
        read_IK = torch.cat([shifted_II[panel, :start].T, shifted_II[start:, panel]])
        factor_KK, failed_at = torch.linalg.cholesky_ex(read_IK[panel])
        failed += failed_at
        pivot_KK = torch.cholesky_inverse(factor_KK)
        swept_IK = read_IK @ pivot_KK
        for rows in panels:
            shifted_II[rows, : rows.stop].addmm_(swept_IK[rows], read_IK[: rows.stop].T, alpha=-1)
        shifted_II[panel, :start] = swept_IK[:start].T
        shifted_II[start:, panel] = swept_IK[start:]
        shifted_II[panel, panel] = pivot_KK.neg_()
    for start, panel in zip(starts, panels, strict=True):
        shifted_II[:start, panel] = shifted_II[panel, :start].T
    if int(failed):
        raise Refusal(
            f"ALPS: the Gram matrix over {len(shifted_II)} inputs is no sum of x xᵀ (it is not positive "
            "semi-definite); check the calibration data"
        )
    return shifted_II.neg_()


def _conjugate_gradients(
    problem: _Scaled, values_OI: Tensor, keep_OI: Tensor, steps: int, gain: float | None = None
) -> Tensor:
    """The minimum of the error over what is kept, approached from `values_OI`, each row on its own: until a row's
    gradient is RESIDUAL of that at zero; or, a product less, until all further steps would take at most `gain` of all
    rows' error, if each took as much less than the one before as the gradient has just shrunk."""
    hessian_II, values_OI = problem.hessian(), values_OI * keep_OI
    residual_OI = problem.gradient(values_OI, hessian_II)
    error = torch.zeros(()) if gain is None else (problem.dense_OI - values_OI).mul_(residual_OI).sum().abs()
    residual_OI.mul_(keep_OI)
    direction_OI = residual_OI.clone()
    left_O1 = residual_OI.square().sum(1, keepdim=True)
    enough_O1 = torch.zeros_like(left_O1)
    if gain is None:
        at_zero_OI = problem.gradient(torch.zeros_like(values_OI), hessian_II).mul_(keep_OI)
        enough_O1 = at_zero_OI.square_().sum(1, keepdim=True) * RESIDUAL**2
    for step in range(steps):
        going_O1 = left_O1 > enough_O1
        if step % LOOKED_AT == 0 and not bool(going_O1.any()):  # a row that is done stands still: looking can wait
            break
        across_OI = (direction_OI @ hessian_II).mul_(keep_OI)
        bend_O1 = (direction_OI * across_OI).sum(1, keepdim=True)
        step_O1 = torch.where(going_O1 & (bend_O1 > 0), left_O1 / bend_O1, 0.0)
        values_OI.addcmul_(step_O1, direction_OI)
        if step == steps - 1:
            break
        residual_OI.addcmul_(step_O1, across_OI, value=-1)
        now_O1 = residual_OI.square().sum(1, keepdim=True)
        if gain is not None:
            taken, shrunk = (step_O1 * left_O1).sum(), now_O1.sum() / left_O1.sum()
            if bool(taken * shrunk <= gain * error * (1 - shrunk)):
                break
        direction_OI.mul_(torch.where(going_O1, now_O1 / left_O1, 0.0)).add_(residual_OI)
        left_O1 = torch.where(going_O1, now_O1, left_O1)
    return values_OI
