"""ALPS against every mask there is, and its values against least squares in float64; inputs that break solvers."""

from functools import partial
from itertools import combinations

import pytest
import torch
from counted_memory import Counted
from hypothesis import given, settings
from hypothesis import strategies as st
from random_layers import correlated as correlated_inputs
from random_layers import weight_of
from torch import Tensor
from trained import BUNDLED, layers

from espalier.stages import alps as method
from espalier.stages.alps import PANEL, RHO, _inverse, alps, solve
from espalier.stages.errors import Refusal
from espalier.stages.sparsegpt import sparsegpt

correlated = partial(correlated_inputs, mixed=2.0)
TARGETS = {
    "half": {"sparsity": 0.5},
    "rows": {"sparsity": 0.5, "scope": "row"},
    "most": {"sparsity": 0.83},
    "2:4": {"pattern": (2, 4)},
    "7:20": {"pattern": (7, 20)},
}


def damped(gram: Tensor, damping: float = 0.01) -> Tensor:
    h = gram.double().clone()
    h.diagonal().add_(damping * h.diagonal().mean())
    return h


def loss(weight: Tensor, pruned: Tensor, hessian: Tensor) -> Tensor:
    """tr((W̃ − W) H (W̃ − W)ᵀ), float64."""
    error = pruned.double() - weight.double()
    return ((error @ hessian) * error).sum()


def least_squares(weight: Tensor, keep: Tensor, hessian: Tensor) -> Tensor:
    """The minimum on each row's support, by a direct solution, float64."""
    best = torch.zeros(weight.shape, dtype=torch.float64)
    for row, (w, kept) in enumerate(zip(weight.double(), keep, strict=True)):
        chosen = kept.nonzero()[:, 0]
        if len(chosen):
            best[row, chosen] = torch.linalg.solve(hessian[chosen][:, chosen], (hessian @ w)[chosen])
    return best


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(2, 70), st.integers(1, 90), st.floats(0, 1), st.integers(0, 10**6))
def test_solve_gives_least_squares_on_the_support(outputs, inputs, tokens, share, seed) -> None:
    weight, x = weight_of(outputs, inputs, seed), correlated(tokens, inputs, seed)
    keep = torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(seed)) < share
    gram = (x.T @ x).float()
    solved = solve(weight, keep, gram)
    assert int(solved[~keep].count_nonzero()) == 0
    best = loss(weight, least_squares(weight, keep, damped(gram)), damped(gram))
    scale = loss(weight, torch.zeros_like(weight), damped(gram))
    assert loss(weight, solved, damped(gram)) <= best + 1e-6 * scale
    masked = loss(weight, weight * keep, damped(gram))  # nothing where all are kept, but for rounding
    assert loss(weight, solved, damped(gram)) <= masked * (1 + 1e-6) + 1e-12 * scale


def test_solve_agrees_with_least_squares_to_a_millionth() -> None:
    weight, x = weight_of(12, 40), correlated(400, 40)
    gram = (x.T @ x).float()
    keep = torch.rand(12, 40, generator=torch.Generator().manual_seed(3)) < 0.5
    best = least_squares(weight, keep, damped(gram))
    torch.testing.assert_close(solve(weight, keep, gram).double(), best, rtol=1e-3, atol=1e-4)
    gap = loss(weight, solve(weight, keep, gram), damped(gram)) / loss(weight, best, damped(gram)) - 1
    assert abs(float(gap)) < 1e-6


def other_inputs(tokens: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A dense model's inputs and a pruned one's, (tokens, I): the second are the first, mixed and disturbed."""
    x = correlated(tokens, inputs, seed)
    generator = torch.Generator().manual_seed(seed + 50)
    noise = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64)
    return x, x @ (torch.eye(inputs) + 0.2 * torch.randn(inputs, inputs, generator=generator)).double() + 0.3 * noise


def nearest(weight: Tensor, keep: Tensor, x: Tensor, read: Tensor, damping: float = 0.01) -> Tensor:
    """argmin ‖X̃ W̃ᵀ − X Wᵀ‖² + λ mean(diag X̃ᵀX̃) ‖W̃ − W‖² on each row's support, by QR of the inputs, float64."""
    pull = (damping * read.square().sum(0).mean()).sqrt()
    inputs = torch.cat([read, pull * torch.eye(read.shape[1])])
    targets = torch.cat([x @ weight.double().T, pull * weight.double().T])
    best = torch.zeros(weight.shape, dtype=torch.float64)
    for row, kept in enumerate(keep):
        best[row, kept] = torch.linalg.lstsq(inputs[:, kept], targets[:, row : row + 1]).solution[:, 0]
    return best


@pytest.mark.parametrize("tokens", [25, 400], ids=["rank-deficient", "full-rank"])
def test_with_a_cross_gram_the_values_aim_at_the_dense_output(tokens) -> None:
    weight, (x, read) = weight_of(12, 40), other_inputs(tokens, 40)
    gram, cross = (read.T @ read).float(), (read.T @ x).float()
    keep = torch.rand(12, 40, generator=torch.Generator().manual_seed(3)) < 0.5
    best = nearest(weight, keep, x, read)
    torch.testing.assert_close(solve(weight, keep, gram, cross=cross).double(), best, rtol=1e-3, atol=1e-4)
    pruned, chosen = alps(weight, gram, sparsity=0.5, cross=cross)
    assert int((~chosen).sum()) == 240

    def error(values: Tensor) -> float:
        return float((read @ values.double().T - x @ weight.double().T).square().sum())

    assert error(pruned) < 0.9 * error(alps(weight, gram, sparsity=0.5)[0])
    assert error(pruned) < 0.9 * error(best)  # a random mask's


def test_a_cross_gram_of_the_same_inputs_changes_nothing() -> None:
    weight, x = weight_of(20, 48), correlated(200, 48)
    gram = (x.T @ x).float()
    pruned, keep = alps(weight, gram, sparsity=0.6)
    with_cross, kept = alps(weight, gram, sparsity=0.6, cross=gram.clone())
    assert torch.equal(keep, kept)
    torch.testing.assert_close(with_cross, pruned, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(solve(weight, keep, gram, cross=gram), solve(weight, keep, gram), rtol=1e-5, atol=1e-5)


def test_a_cross_gram_with_channels_that_only_the_dense_model_feeds() -> None:
    """What the dense model sends through a channel that pruning silenced is taken over by those that depend on it."""
    weight, x = weight_of(4, 12), correlated(300, 12)
    read = x.clone()
    read[:, 5] = 0
    gram, cross = (read.T @ read).float(), (read.T @ x).float()
    keep = torch.ones(4, 12, dtype=torch.bool)
    keep[:, 5] = False
    best = nearest(weight, keep, x, read)
    torch.testing.assert_close(solve(weight, keep, gram, cross=cross).double(), best, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tokens", [30, 600], ids=["rank-deficient", "full-rank"])
@pytest.mark.parametrize("target", TARGETS)
def test_the_end_lowers_the_error_and_is_below_that_of_sparsegpt(target, tokens) -> None:
    weight, x = weight_of(50, 120), correlated(tokens, 120)
    gram = (x.T @ x).float()
    pruned, keep = alps(weight, gram, **TARGETS[target])
    assert torch.equal(pruned != 0, keep)
    chosen = {name: value for name, value in TARGETS[target].items() if name != "scope"}
    peer, _ = sparsegpt(weight, gram, **chosen)
    assert loss(weight, pruned, damped(gram)) < 0.95 * loss(weight, peer, damped(gram))
    best = loss(weight, least_squares(weight, keep, damped(gram)), damped(gram))
    assert best <= loss(weight, pruned, damped(gram)) * (1 + 1e-6) <= (1.05 if tokens < 120 else 1.02) * best
    # Its mask is better too: the best values on that of SparseGPT leave more.
    assert best < loss(weight, least_squares(weight, peer != 0, damped(gram)), damped(gram))


@pytest.mark.parametrize("target", TARGETS)
def test_where_admm_comes_to_rest_it_is_at_least_squares_on_its_mask(target, monkeypatch) -> None:
    """The mask held: a mask that ADMM would change is no place of rest."""
    weight, x = weight_of(20, 40), correlated(400, 40)
    gram = (x.T @ x).float()
    monkeypatch.setattr(method, "LAST_STEPS", 0)  # ADMM alone
    _, keep = alps(weight, gram, **TARGETS[target])
    monkeypatch.setattr(method, "STEPS", 400)
    monkeypatch.setattr(method, "keep_mask", lambda *_: keep)
    values, _ = alps(weight, gram, **TARGETS[target])
    best = least_squares(weight, keep, damped(gram))
    torch.testing.assert_close(values.double(), best, rtol=1e-3, atol=1e-4)
    assert loss(weight, values, damped(gram)) <= loss(weight, best, damped(gram)) * (1 + 1e-6)


@pytest.mark.parametrize("tokens", [1, 30, 600], ids=["one-token", "rank-deficient", "full-rank"])
@pytest.mark.parametrize("target", TARGETS)
def test_conjugate_gradients_never_raise_the_error(target, tokens, monkeypatch) -> None:
    weight, x = weight_of(50, 120), correlated(tokens, 120)
    gram = (x.T @ x).float()
    after, keep = alps(weight, gram, **TARGETS[target])
    monkeypatch.setattr(method, "LAST_STEPS", 0)
    before, same = alps(weight, gram, **TARGETS[target])
    assert torch.equal(keep, same) and not torch.equal(before, after)
    assert loss(weight, after, damped(gram)) <= loss(weight, before, damped(gram)) * (1 + 1e-6)


@pytest.mark.parametrize("block", [0, 1])
def test_no_layer_of_a_trained_model_is_above_sparsegpt(block) -> None:
    """The bundled model's; all layers of two others are in tests/benchmarks/README.md."""
    for name, (weight, statistics) in layers(BUNDLED, block).items():
        gram = statistics.gram
        for target in (
            {"sparsity": 0.5},
            {"sparsity": 0.6},
            {"sparsity": 0.7},
            {"pattern": (2, 4)},
            {"pattern": (4, 8)},
        ):
            found, peer = alps(weight, gram, **target)[0], sparsegpt(weight, gram, **target)[0]
            assert loss(weight, found, gram.double()) <= loss(weight, peer, gram.double()), (name, target)


def test_small_rows_end_near_the_best_of_all_masks() -> None:
    """Of 8 inputs 4 are kept: 70 masks a row, each with its own least squares."""
    found, least, start = [], [], []
    for seed in range(12):
        weight, x = weight_of(6, 8, seed), correlated(100, 8, seed)
        gram = (x.T @ x).float()
        hessian = damped(gram)
        pruned, keep = alps(weight, gram, sparsity=0.5, scope="row")
        assert keep.sum(1).eq(4).all()
        for row, w in enumerate(weight):
            losses = []
            for chosen in combinations(range(8), 4):
                mask = torch.zeros(1, 8, dtype=torch.bool)
                mask[0, list(chosen)] = True
                losses.append(float(loss(w[None], least_squares(w[None], mask, hessian), hessian)))
            found.append(float(loss(w[None], pruned[row : row + 1], hessian)))
            least.append(min(losses))
            start.append(sorted(losses)[len(losses) // 2])
            assert found[-1] >= least[-1] * (1 - 1e-5)
    assert sum(found) < 1.25 * sum(least) < 0.5 * sum(start)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 12),
    st.sampled_from([4, 20, 64, 148]),
    st.integers(1, 160),
    st.sampled_from([0.0, 0.3, 0.5, 0.99, (2, 4), (1, 4), (4, 4)]),
    st.integers(0, 10**6),
)
def test_exactly_as_many_zeros_as_asked_for_whatever_the_inputs(outputs, inputs, tokens, target, seed) -> None:
    weight, x = weight_of(outputs, inputs, seed), correlated(tokens, inputs, seed)
    x[:, :: 1 + seed % 3] *= seed % 2  # none, some or all channels dead
    weight[0] = 1 if seed % 5 else 0  # a row of equals, or of zeros
    gram = (x.T @ x).float()
    if isinstance(target, tuple):
        pruned, keep = alps(weight, gram, pattern=target)
        assert keep.view(outputs, -1, 4).sum(-1).eq(target[0]).all()
    else:
        pruned, keep = alps(weight, gram, sparsity=target)
        assert int((~keep).sum()) == int(outputs * inputs * target)
    assert bool(pruned.isfinite().all())
    assert int(pruned[~keep].count_nonzero()) == 0


def test_channels_that_saw_nothing_go_first_and_keep_their_values() -> None:
    weight, x = weight_of(4, 12), correlated(60, 12)
    x[:, 3:6] = 0
    gram = (x.T @ x).float()
    _, keep = alps(weight, gram, sparsity=0.5)
    assert not keep[:, 3:6].any()
    pruned, keep = alps(weight, gram, sparsity=0.1)  # 4 zeros, 12 dead weights
    assert int((~keep[:, 3:6]).sum()) == 4
    assert torch.equal(pruned[:, 3:6][keep[:, 3:6]], weight[:, 3:6][keep[:, 3:6]])


def test_no_input_at_all_leaves_magnitude() -> None:
    weight = weight_of(3, 8)
    pruned, keep = alps(weight, torch.zeros(8, 8), sparsity=0.5, scope="row")
    assert torch.equal(pruned, weight * keep)
    assert float(pruned.abs().sum()) > float((weight * ~keep).abs().sum())


def test_scale_of_the_gram_matrix_changes_nothing_that_matters() -> None:
    weight, x = weight_of(20, 40), correlated(200, 40)
    gram = (x.T @ x).float()
    for factor in (1e-6, 1e6):
        pruned, _ = alps(weight, gram * factor, sparsity=0.6)
        ratio = loss(weight, pruned, damped(gram)) / loss(weight, alps(weight, gram, 0.6)[0], damped(gram))
        assert 0.99 < float(ratio) < 1.01


def test_dtype_is_kept_and_the_weight_left_alone() -> None:
    weight, x = weight_of(8, 16).bfloat16(), correlated(90, 16)
    before = weight.clone()
    pruned, _ = alps(weight, (x.T @ x).float(), pattern=(2, 4))
    assert pruned.dtype == torch.bfloat16
    assert torch.equal(weight, before)


def test_refusals_name_what_is_wrong() -> None:
    weight, gram = weight_of(4, 8), torch.eye(8)
    with pytest.raises(Refusal, match="NaN or infinity"):
        alps(weight, gram * float("nan"), sparsity=0.5)
    keep = torch.ones(4, 8, dtype=torch.bool)
    with pytest.raises(Refusal, match=r"^solve: the Gram matrix over 8 inputs holds NaN or infinity"):
        solve(weight, keep, gram * float("nan"))
    with pytest.raises(Refusal, match=r"^solve: the values found are not finite"):
        solve(weight * 3e38 * 10, keep, gram)
    with pytest.raises(Refusal, match=r"^ALPS: the cross Gram matrix over 8 inputs"):
        alps(weight, gram, sparsity=0.5, cross=gram * float("inf"))
    with pytest.raises(Refusal, match="damping 2"):
        alps(weight, gram, sparsity=0.5, damping=2)
    with pytest.raises(Refusal, match="groups of 3"):
        alps(weight, gram, pattern=(1, 3))
    with pytest.raises(Refusal, match="no sum of x xᵀ"):
        alps(weight, torch.eye(8) - torch.ones(8, 8) + torch.eye(8), sparsity=0.5)
    with pytest.raises(ValueError, match="one of sparsity and pattern"):
        alps(weight, gram)


def test_the_inverse_is_found_in_the_place_of_the_matrix() -> None:
    """Panel by panel, some of them narrower than the others; nothing of its size is made."""
    for size in (5, PANEL, 5 * PANEL + 7):
        x_TI = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(size))
        shifted_II = torch.corrcoef(x_TI.T)
        shifted_II = (shifted_II + shifted_II.T) / 2
        shifted_II.diagonal().fill_(1 + RHO)
        wanted_II = torch.linalg.inv(shifted_II.double())
        with Counted() as counted:
            found_II = _inverse(shifted_II)
        assert found_II is shifted_II
        torch.testing.assert_close(found_II.double(), wanted_II, rtol=1e-5, atol=1e-5)
        assert counted.peak <= found_II.nbytes + 8 * 4 * PANEL * max(PANEL, size)
