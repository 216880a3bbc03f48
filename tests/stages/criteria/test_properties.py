"""Every criterion with every pattern, over shapes and layers of every degenerate kind: the zeros are always exact."""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from espalier.stages.criteria.equations import CRITERIA
from espalier.stages.criteria.scoring import score, score_rows
from espalier.stages.masks import keep_mask, masked
from espalier.stages.statistics import InputStatistics

quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
PATTERNS = [(2, 4), (4, 8), (6, 8), (1, 4), (2, 2), (3, 4), (1, 2), (10, 12), (14, 16), (1, 1)]
KINDS = ["normal", "equal", "zero", "zero rows", "zero columns", "one alive", "huge and tiny", "already pruned"]


@st.composite
def layers(draw, multiple: int = 1) -> tuple[Tensor, InputStatistics]:
    """A weight and the statistics of its inputs, both of a drawn kind; often fewer tokens than channels."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 5)) * multiple
    samples, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    kind, dtype = draw(st.sampled_from(KINDS)), draw(st.sampled_from([torch.float32, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(samples, tokens, columns, generator=generator)
    if kind == "equal":
        weight, x = torch.full_like(weight, 0.25), torch.ones_like(x)
    elif kind == "zero":
        weight = torch.zeros_like(weight)
    elif kind == "zero rows":
        weight[:: draw(st.integers(1, 3))] = 0.0
    elif kind == "zero columns":
        weight[:, :: draw(st.integers(1, 3))] = 0.0
    elif kind == "one alive":
        weight, alive = torch.zeros_like(weight), (rows - 1, columns // 2)
        weight[alive] = 1.0
    elif kind == "huge and tiny":
        weight *= 10.0 ** torch.randint(-30, 12, (rows, 1), generator=generator)
    elif kind == "already pruned":
        weight = masked(weight, keep_mask(weight.abs(), 0.5))
    dead = draw(st.sampled_from(["none", "one", "all"]))
    x[..., : {"none": 0, "one": 1, "all": columns}[dead]] = 0.0
    return weight.to(dtype), statistics_of(x)


BY_WEIGHT = [name for name, criterion in CRITERIA.items() if not criterion.from_shadow]  # the others: test_temporal


def statistics_of(x: Tensor) -> InputStatistics:
    statistics = InputStatistics(x.shape[-1], hessian=True)
    statistics.update(x)
    return statistics


def by_rows(name: str, weight: Tensor, statistics: InputStatistics) -> Tensor:
    return torch.cat([scores for _, scores in score_rows(name, weight, statistics)])


@pytest.mark.parametrize("name", BY_WEIGHT)
def test_every_row_or_matrix_loses_exactly_its_share(name) -> None:
    @quick
    @given(layers(), st.floats(0, 0.999))
    def check(layer: tuple[Tensor, InputStatistics], sparsity: float) -> None:
        weight, statistics = layer
        scores = score(name, weight, statistics)
        assert (scores.dtype, scores.shape) == (torch.float32, weight.shape)
        assert scores.isfinite().all() and (scores >= 0).all()
        assert ((~keep_mask(scores, sparsity)).sum(-1) == int(weight.shape[1] * sparsity)).all()
        assert int((~keep_mask(scores, sparsity, scope="matrix")).sum()) == int(weight.numel() * sparsity)
        assert torch.equal(keep_mask(by_rows(name, weight, statistics), sparsity), keep_mask(scores, sparsity))

    check()


@pytest.mark.parametrize("name", BY_WEIGHT)
def test_every_group_keeps_exactly_n_of_m(name) -> None:
    @quick
    @given(st.sampled_from(PATTERNS).flatmap(lambda pattern: st.tuples(st.just(pattern), layers(multiple=pattern[1]))))
    def check(drawn: tuple[tuple[int, int], tuple[Tensor, InputStatistics]]) -> None:
        pattern, (weight, statistics) = drawn
        keep = keep_mask(score(name, weight, statistics), pattern=pattern)
        assert (keep.reshape(-1, pattern[1]).sum(-1) == pattern[0]).all()
        assert torch.equal(keep_mask(by_rows(name, weight, statistics), pattern=pattern), keep)

    check()


@pytest.mark.parametrize("name", BY_WEIGHT)
def test_a_zero_weight_goes_before_any_other_of_its_row(name) -> None:
    """So pruning again what is already pruned at the same ratio changes nothing."""

    @quick
    @given(layers(multiple=4))
    def check(layer: tuple[Tensor, InputStatistics]) -> None:
        weight, statistics = layer
        scores = score(name, weight, statistics)
        assert (scores[weight == 0] == 0).all()
        statistics = statistics_of(torch.ones(1, 1, weight.shape[1]))
        once = masked(weight, keep_mask(score(name, weight, statistics), pattern=(2, 4)))
        scores = score(name, once, statistics)
        assume(((scores == 0) == (once == 0)).all())  # not among weights that float32 multiplies to nothing
        again = masked(once, keep_mask(scores, pattern=(2, 4)))
        assert torch.equal(once, again)

    check()


@pytest.mark.parametrize("name", [name for name in BY_WEIGHT if name != "stochria"])
def test_the_order_of_rows_does_not_matter(name) -> None:
    @quick
    @given(layers(), st.randoms(use_true_random=False))
    def check(layer: tuple[Tensor, InputStatistics], random) -> None:
        weight, statistics = layer
        order = list(range(len(weight)))
        random.shuffle(order)
        scores = score(name, weight, statistics)
        torch.testing.assert_close(score(name, weight[order], statistics), scores[order], rtol=1e-5, atol=0)

    check()


@pytest.mark.parametrize("name", [name for name in BY_WEIGHT if name != "symwanda"])
def test_the_scale_of_a_layer_does_not_change_its_mask(name) -> None:
    """symwanda's adds norms of inputs and of outputs, and the outputs grow with the weight."""
    generator = torch.Generator().manual_seed(0)
    weight, statistics = (
        torch.randn(32, 64, generator=generator),
        statistics_of(torch.randn(2, 40, 64, generator=generator)),
    )
    expected = keep_mask(score(name, weight, statistics), 0.5)
    for scale in (2.0**-20, 2.0**20):
        assert torch.equal(keep_mask(score(name, weight * scale, statistics), 0.5), expected)
