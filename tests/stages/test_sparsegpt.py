"""SparseGPT against the paper's algorithm, a column at a time in float64, and on inputs that break solvers."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_layers import correlated, weight_of
from torch import Tensor

from espalier.stages.errors import Refusal
from espalier.stages.sparsegpt import factor_with_damping, inverse_factor, sparsegpt
from espalier.stages.statistics import InputStatistics

TARGETS = {
    "half": {"sparsity": 0.5},
    "most": {"sparsity": 0.83},
    "2:4": {"pattern": (2, 4)},
    "1:3": {"pattern": (1, 3)},
    "7:20": {"pattern": (7, 20)},
}


def dead_as_one(hessian: Tensor, damping: float) -> Tensor:
    """H as the paper damps it, float64."""
    h = hessian.double().clone()
    h.diagonal()[h.diagonal() == 0] = 1
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)


def by_columns(weight, hessian, sparsity=None, pattern=None, block_size=128, damping=0.01, keep=None):
    """The algorithm of the paper, nothing blocked: after each column, the rest of the row makes up for its error."""
    w = weight.double().clone()
    w[:, hessian.diagonal() == 0] = 0
    upper = torch.linalg.cholesky(torch.linalg.inv(dead_as_one(hessian, damping)), upper=True)
    drop = torch.zeros_like(w, dtype=torch.bool) if keep is None else ~keep
    for j in range(w.shape[1]):
        if sparsity is not None and j % block_size == 0:
            end = min(j + block_size, w.shape[1])
            cost = (w[:, j:end] / upper.diagonal()[j:end]).square()
            lowest = cost.flatten().argsort(stable=True)[: int(cost.numel() * sparsity) + 1]
            drop[:, j:end] = torch.zeros(cost.numel(), dtype=torch.bool).index_fill(0, lowest, True).view_as(cost)
        if pattern is not None and j % pattern[1] == 0:
            end = j + pattern[1]
            cost = (w[:, j:end] / upper.diagonal()[j:end]).square()
            lowest = cost.argsort(dim=1, stable=True)[:, : pattern[1] - pattern[0]]
            drop[:, j:end] = torch.zeros_like(cost, dtype=torch.bool).scatter_(1, lowest, True)
        error = torch.where(drop[:, j], w[:, j], 0.0) / upper[j, j]
        w[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
        w[drop[:, j], j] = 0
    return w, ~drop


def error(weight: Tensor, pruned: Tensor, x: Tensor) -> float:
    """‖X (W̃ − W)ᵀ‖ in float64."""
    return float((x @ (pruned.double() - weight.double()).T).norm())


@pytest.mark.parametrize("block_size", [1, 7, 20, 128])
@pytest.mark.parametrize("target", TARGETS)
def test_result_is_that_of_the_algorithm_one_column_at_a_time(target, block_size) -> None:
    weight, x = weight_of(23, 60), correlated(200, 60)
    hessian = (x.T @ x).float()
    pruned, keep = sparsegpt(weight, hessian, **TARGETS[target], block_size=block_size)
    expected, expected_keep = by_columns(weight, hessian, **TARGETS[target], block_size=block_size)
    assert torch.equal(keep, expected_keep)
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(pruned == 0, ~keep)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 90), st.floats(0, 1), st.integers(0, 10**6))
def test_a_given_mask_is_kept_and_its_survivors_updated(outputs, inputs, tokens, share, seed) -> None:
    weight, x = weight_of(outputs, inputs, seed), correlated(tokens, inputs, seed)
    keep = torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(seed)) < share
    pruned, same = sparsegpt(weight, (x.T @ x).float(), keep=keep, block_size=5)
    expected, _ = by_columns(weight, x.T @ x, keep=keep)
    assert torch.equal(same, keep)
    assert int(pruned[~keep].count_nonzero()) == 0
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("target", TARGETS)
def test_chosen_mask_given_again_gives_the_same_weight(target) -> None:
    """So the update does not depend on how it was cut into blocks."""
    weight, x = weight_of(40, 300), correlated(900, 300)
    hessian = (x.T @ x).float()
    pruned, keep = sparsegpt(weight, hessian, **TARGETS[target])
    again, _ = sparsegpt(weight, hessian, keep=keep, factor=inverse_factor(hessian))
    torch.testing.assert_close(again, pruned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [20, 600], ids=["rank-deficient", "full-rank"])
@pytest.mark.parametrize("target", TARGETS)
def test_update_lowers_the_output_error_of_its_mask(target, tokens) -> None:
    weight, x = weight_of(50, 120), correlated(tokens, 120)
    pruned, keep = sparsegpt(weight, (x.T @ x).float(), **TARGETS[target])
    assert error(weight, pruned, x) < (0.97 if tokens > 120 else 0.9) * error(weight, weight * keep, x)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 12),
    st.sampled_from([4, 20, 64, 148]),
    st.integers(1, 160),
    st.sampled_from([0.0, 0.3, 0.5, 0.99, (2, 4), (1, 4), (4, 4)]),
    st.integers(0, 10**6),
)
def test_degenerate_inputs_give_finite_weights_and_exact_zeros(outputs, inputs, tokens, target, seed) -> None:
    """Fewer tokens than channels, dead and duplicate channels, all-zero and all-equal rows."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(4, (inputs,), generator=generator)
    x = correlated(tokens, inputs, seed).float()
    x[:, kind == 1] = 0
    x[:, kind == 2] = x[:, :1]
    weight = weight_of(outputs, inputs, seed)
    weight[0] = 0
    weight[-1] = weight[-1, 0]
    statistics = InputStatistics(inputs, hessian=True)
    statistics.update(x[None])
    choice = {"pattern": target} if isinstance(target, tuple) else {"sparsity": target}
    pruned, keep = sparsegpt(weight, statistics.hessian, **choice)
    assert bool(pruned.isfinite().all())
    assert int(pruned[~keep].count_nonzero()) == 0
    assert int(pruned[:, statistics.norm == 0].count_nonzero()) == 0
    if isinstance(target, tuple):
        assert bool((keep.view(outputs, -1, target[1]).sum(-1) == target[0]).all())
    else:
        blocks = [outputs * min(128, inputs - start) for start in range(0, inputs, 128)]
        zeros = sum(min(n, int(n * target) + 1) for n in blocks) if target else 0
        assert int((~keep).sum()) == zeros


def test_dead_columns_are_the_first_to_go() -> None:
    x = correlated(300, 64)
    x[:, ::4] = 0
    weight = weight_of(30, 64)
    _, keep = sparsegpt(weight, x.T @ x, sparsity=0.5)
    assert not keep[:, ::4].any()
    _, keep = sparsegpt(weight, x.T @ x, pattern=(2, 4))
    assert not keep[:, ::4].any()


def test_nothing_known_of_the_inputs_leaves_zeros_and_no_crash() -> None:
    pruned, keep = sparsegpt(weight_of(4, 8), torch.zeros(8, 8), pattern=(2, 4))
    assert int(pruned.count_nonzero()) == 0
    assert int(keep.sum()) == 16


def test_uncorrelated_equal_inputs_prune_by_magnitude_without_an_update() -> None:
    weight = weight_of(16, 40)
    pruned, keep = sparsegpt(weight, torch.eye(40), pattern=(2, 4))
    strongest = weight.abs().view(16, 10, 4).argsort(-1)[..., 2:]
    assert torch.equal(keep.view(16, 10, 4), torch.zeros(16, 10, 4, dtype=torch.bool).scatter_(-1, strongest, True))
    torch.testing.assert_close(pruned, weight * keep, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_come_back_as_they_went_in(dtype) -> None:
    weight, x = weight_of(24, 64).to(dtype), correlated(200, 64)
    before = weight.clone()
    pruned, keep = sparsegpt(weight, x.T @ x, pattern=(2, 4))
    in_float32, _ = sparsegpt(weight.float(), (x.T @ x).float(), pattern=(2, 4))
    assert pruned.dtype == dtype
    assert torch.equal(weight, before)
    torch.testing.assert_close(pruned.float(), in_float32.to(dtype).float())
    assert int((~keep).sum()) == 24 * 32


def test_a_transposed_weight_and_an_autocast_region_change_nothing() -> None:
    weight, x = weight_of(24, 300), correlated(900, 300)
    expected, keep = sparsegpt(weight, x.T @ x, sparsity=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pruned, same = sparsegpt(weight.T.contiguous().T.requires_grad_(), x.T @ x, sparsity=0.5)
    assert torch.equal(pruned, expected)
    assert torch.equal(keep, same)
    assert pruned.is_contiguous()
    assert keep.is_contiguous()
    assert not pruned.requires_grad


@pytest.mark.parametrize("inputs", [1, 5, 128, 129, 300])
def test_factor_is_upper_triangular_and_its_square_inverts_the_damped_hessian(inputs) -> None:
    x = correlated(inputs // 2 + 1, inputs)
    x[:, inputs // 2] = 0
    hessian = (x.T @ x).float()
    upper, damping = factor_with_damping(hessian, 0.01)
    assert damping == 0.01
    assert upper.dtype == torch.float32
    assert torch.equal(upper, upper.triu())
    assert bool((upper.diagonal() > 0).all())
    product = dead_as_one(hessian, 0.01) @ (upper.double().T @ upper.double())
    torch.testing.assert_close(product, torch.eye(inputs, dtype=torch.float64), rtol=0, atol=1e-3)


def test_damping_rises_tenfold_until_the_hessian_is_positive_definite_and_is_logged(caplog) -> None:
    hessian = torch.eye(6)
    hessian[2, 3] = hessian[3, 2] = 1.05  # an eigenvalue of -0.05: damping 0.1 mends it
    with caplog.at_level(logging.WARNING):
        upper, damping = factor_with_damping(hessian, 0.001)
    assert damping == pytest.approx(0.1)
    assert [record.getMessage() for record in caplog.records] == [
        "Hessian over 6 inputs: not positive definite with damping 0.001; trying 0.01",
        "Hessian over 6 inputs: not positive definite with damping 0.01; trying 0.1",
    ]
    product = dead_as_one(hessian, 0.1) @ (upper.double().T @ upper.double())
    torch.testing.assert_close(product, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-4)


def test_no_damping_on_a_rank_deficient_hessian_is_retried_not_a_crash() -> None:
    x = torch.ones(3, 32)
    upper, damping = factor_with_damping(x.T @ x, damping=0)
    assert 0 < damping <= 0.01
    assert bool(upper.isfinite().all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (5, 2), (31, 31)])
def test_a_hessian_that_is_not_finite_is_refused(bad, place) -> None:
    hessian = torch.eye(32)
    hessian[place] = hessian[place[::-1]] = bad
    with pytest.raises(Refusal, match="32 inputs holds NaN or infinity"):
        inverse_factor(hessian)


def test_what_cannot_be_a_sum_of_squares_is_refused() -> None:
    hessian = torch.eye(6)
    hessian[2, 3] = hessian[3, 2] = 3
    with pytest.raises(Refusal, match="not positive definite even with damping 1"):
        inverse_factor(hessian)


@pytest.mark.parametrize("damping", [-0.1, 1.5, float("nan")])
def test_a_damping_out_of_range_is_refused(damping) -> None:
    with pytest.raises(Refusal, match="share of the mean diagonal"):
        inverse_factor(torch.eye(4), damping)


def test_choices_that_do_not_fit_are_refused() -> None:
    weight, hessian = weight_of(4, 10), torch.eye(10)
    with pytest.raises(Refusal, match="10 inputs cannot be cut into groups of 4"):
        sparsegpt(weight, hessian, pattern=(2, 4))
    with pytest.raises(Refusal, match="at least 0 and below 1"):
        sparsegpt(weight, hessian, sparsity=1.0)
    with pytest.raises(Refusal, match="block_size 0"):
        sparsegpt(weight, hessian, sparsity=0.5, block_size=0)
    with pytest.raises(ValueError, match="exactly one"):
        sparsegpt(weight, hessian, sparsity=0.5, pattern=(2, 4))
    with pytest.raises(ValueError, match="exactly one"):
        sparsegpt(weight, hessian)
    weight[1, 2] = float("inf")
    with pytest.raises(Refusal, match="not finite"):
        sparsegpt(weight, hessian, sparsity=0.5)
