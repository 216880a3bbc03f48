"""Scores against float64 arithmetic, and what may go wrong with them."""

import pytest
import torch

from stages.criteria import CRITERIA, check_criterion, score
from stages.errors import Refusal
from stages.masks import keep_mask
from stages.statistics import InputStatistics


def statistics_of(x: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics(x.shape[-1])
    statistics.update(x)
    return statistics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_equal_the_formulas_in_float64(dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 8, generator=generator).to(dtype)
    x = torch.randn(3, 5, 8, generator=generator).to(dtype)
    statistics = statistics_of(x)
    norm = x.double().reshape(-1, 8).norm(dim=0)
    expected = {"magnitude": weight.double().abs(), "wanda": weight.double().abs() * norm}
    assert set(expected) <= set(CRITERIA)
    for name, reference in expected.items():
        scores = score(name, weight, statistics)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores.double(), reference, rtol=1e-6, atol=0)


def test_wanda_equals_magnitude_on_isotropic_inputs() -> None:
    weight = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    statistics = statistics_of(torch.eye(8).repeat(4, 1)[None])  # every channel has the norm 2
    for choice in ({"sparsity": 0.5}, {"pattern": (2, 4)}, {"sparsity": 0.3, "scope": "matrix"}):
        wanda, magnitude = (keep_mask(score(name, weight, statistics), **choice) for name in ("wanda", "magnitude"))
        assert torch.equal(wanda, magnitude)


def test_wanda_follows_the_inputs() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    statistics = statistics_of(torch.tensor([[[9.0, 1.0, 1.0, 0.0]]]))
    assert keep_mask(score("wanda", weight, statistics), 0.5).tolist() == [[True, False, True, False]]
    assert keep_mask(score("magnitude", weight, statistics), 0.5).tolist() == [[False, False, True, True]]


def test_the_weight_is_left_as_it_was() -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    before, statistics = weight.clone(), statistics_of(torch.ones(1, 2, 8))
    for name in CRITERIA:
        score(name, weight, statistics)
        assert torch.equal(weight, before), name


def test_an_unknown_criterion_is_refused_with_the_nearest() -> None:
    with pytest.raises(Refusal, match=r"'wander' is unknown; did you mean wanda\? there are: .*magnitude"):
        check_criterion("wander")
    with pytest.raises(Refusal, match=r"'xyz' is unknown; there are: .*wanda"):
        check_criterion("xyz")
    with pytest.raises(Refusal, match="did you mean magnitude"):
        score("magnitud", torch.ones(1, 1), InputStatistics(1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(bad) -> None:
    weight = torch.ones(4, 8)
    weight[2, 3] = bad
    for name in ("magnitude", "wanda"):
        with pytest.raises(Refusal, match=f"criterion {name}: scores are not finite"):
            score(name, weight, statistics_of(torch.ones(1, 2, 8)))
