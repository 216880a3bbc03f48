"""Swaps against every pair in float64, and what they keep whatever the weights and inputs."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trained import BUNDLED, error, layers

from espalier.stages.criteria.scoring import score
from espalier.stages.errors import Refusal
from espalier.stages.masks import keep_mask
from espalier.stages.refine import dsnot, swaps
from espalier.stages.refine import sparse_swaps as module
from espalier.stages.statistics import InputStatistics

quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
PATTERNS = [None, (2, 4), (1, 4), (4, 8), (6, 8)]
UNTIL_DONE = 10_000  # rounds


def layer(
    rows: int, columns: int, seed: int = 0, tokens: int = 200, spread: float = 0.5
) -> tuple[torch.Tensor, InputStatistics]:
    """Random weights; inputs that hang together, of sizes from 10 ** -spread to 10 ** spread."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, max(1, columns // 4), generator=generator)
    x = shared @ torch.randn(shared.shape[1], columns, generator=generator) * 0.6
    x = (x + torch.randn(tokens, columns, generator=generator)) * torch.logspace(-spread, spread, columns)
    statistics = InputStatistics(columns, hessian=True)
    statistics.update(x)
    return torch.randn(rows, columns, generator=generator), statistics


def start_of(weight, statistics, pattern, sparsity: float = 0.5, criterion: str = "wanda") -> torch.Tensor:
    return keep_mask(score(criterion, weight, statistics), None if pattern else sparsity, pattern)


def best_gain(weight, keep, statistics, pattern) -> torch.Tensor:
    """The least change of error by one swap of each row, as a share of the row's Σ W² G_ii, (O,) float64."""
    gram, best = statistics.gram.double(), torch.zeros(len(weight), dtype=torch.float64)
    for row, w in enumerate(weight.double()):
        gone = w * ~keep[row]
        now = gone @ gram @ gone
        for i in (~keep[row]).nonzero()[:, 0].tolist():
            for j in keep[row].nonzero()[:, 0].tolist():
                if pattern is None or i // pattern[1] == j // pattern[1]:
                    other = gone.clone()
                    other[i], other[j] = 0, w[j]
                    best[row] = min(best[row], other @ gram @ other - now)
        best[row] /= (w.square() * gram.diagonal()).sum().clamp_min(1e-300)
    return best


@pytest.mark.parametrize("options", [{}, {"shortlist": 3}, {"shortlist": 2, "swaps_per_round": 1}])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_they_end_only_where_no_swap_helps(pattern, options) -> None:
    for seed, tokens in ((0, 200), (1, 9)):  # 9 tokens: G has no full rank
        weight, statistics = layer(6, 24, seed, tokens)
        keep = start_of(weight, statistics, pattern)
        assert (best_gain(weight, keep, statistics, pattern) < -1e-3).any()
        better = swaps(weight, keep, statistics, pattern, rounds=UNTIL_DONE, **options)
        assert (best_gain(weight, better, statistics, pattern) > -1e-5).all()
        assert torch.equal(swaps(weight, better, statistics, pattern, rounds=UNTIL_DONE, **options), better)


def test_one_swap_is_the_best_of_all_pairs() -> None:
    weight, statistics = layer(8, 20)
    keep = start_of(weight, statistics, None)
    better = swaps(weight, keep, statistics, rounds=1, shortlist=20, swaps_per_round=1)
    assert ((better != keep).sum(1) <= 2).all()
    scale = (weight.double().square() * statistics.gram.double().diagonal()).sum(1)
    change = (error(weight, better, statistics) - error(weight, keep, statistics)) / scale
    torch.testing.assert_close(change, best_gain(weight, keep, statistics, None), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("columns", [48, 400])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_error_of_every_row_falls_with_every_round(pattern, columns) -> None:
    weight, statistics = layer(24, columns, tokens=columns // 2, spread=1.5)
    keep = start_of(weight, statistics, pattern)
    trail = [error(weight, keep, statistics)]
    masks = [keep]
    for rounds in range(1, 13):
        masks.append(swaps(weight, keep, statistics, pattern, rounds=rounds))
        trail.append(error(weight, masks[-1], statistics))
        moved = (masks[-1] != masks[-2]).any(1)
        assert (trail[-1][moved] < trail[-2][moved]).all()
        assert torch.equal(trail[-1][~moved], trail[-2][~moved])
    assert trail[-1].sum() < 0.8 * trail[0].sum()


@st.composite
def cases(draw):
    """Weights, statistics, pattern, mask; rows and channels that hold nothing or all the same, few tokens."""
    pattern = draw(st.sampled_from(PATTERNS))
    columns = draw(st.integers(1, 6)) * (pattern[1] if pattern else 3)
    seed, tokens = draw(st.integers(0, 2**31)), draw(st.sampled_from([1, 3, 100]))
    weight, statistics = layer(draw(st.integers(1, 5)), columns, seed, tokens, draw(st.sampled_from([0.0, 0.5, 3.0])))
    if draw(st.booleans()):
        weight[draw(st.integers(0, len(weight) - 1))] = draw(st.sampled_from([0.0, 1.0]))
    if draw(st.booleans()):
        weight[:, draw(st.integers(0, columns - 1))] = 0
    if draw(st.booleans()):
        x = torch.ones(1, tokens, columns) * draw(st.sampled_from([0.0, 1e-15, 1.0, 1e15]))  # all channels the same
        x[..., draw(st.integers(0, columns - 1))] = 0
        statistics = InputStatistics(columns, hessian=True)
        statistics.update(x)
    return weight, statistics, pattern, start_of(weight, statistics, pattern, draw(st.floats(0, 0.95)), "magnitude")


@quick
@given(cases(), st.sampled_from([1, 4, 16]))
def test_zeros_stay_as_many_and_no_row_gets_worse(case, shortlist) -> None:
    weight, statistics, pattern, keep = case
    given_keep = keep.clone()
    better = swaps(weight, keep, statistics, pattern, rounds=30, shortlist=shortlist)
    assert torch.equal(keep, given_keep)
    assert (better.dtype, better.shape) == (torch.bool, keep.shape)
    width = pattern[1] if pattern else keep.shape[1]
    assert torch.equal(better.unflatten(1, (-1, width)).sum(-1), keep.unflatten(1, (-1, width)).sum(-1))
    assert (error(weight, better, statistics) <= error(weight, keep, statistics)).all()


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_chunks_of_rows_do_not_show(pattern, monkeypatch) -> None:
    weight, statistics = layer(20, 400)
    keep = start_of(weight, statistics, pattern)
    whole = swaps(weight, keep, statistics, pattern)
    assert not torch.equal(whole, keep)
    for chunk, cache in ((400, 400), (7 * 400, 3 * 400), (1 << 30, 1 << 30)):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
        monkeypatch.setattr(module, "CACHE_ELEMENTS", cache)
        assert torch.equal(swaps(weight, keep, statistics, pattern), whole)


def test_the_size_of_the_inputs_does_not_matter() -> None:
    weight, statistics = layer(10, 64)
    keep = start_of(weight, statistics, None)
    expected = swaps(weight, keep, statistics)
    for scale in (2.0**-60, 2.0**40):
        other = InputStatistics(64, hessian=True)
        other.merge(statistics)
        other.gram.mul_(scale)
        assert torch.equal(swaps(weight, keep, other), expected)
    half = torch.nn.Parameter(weight.bfloat16())
    assert torch.equal(swaps(half, keep, statistics), swaps(half.float(), keep, statistics))


@pytest.mark.parametrize("model", ["bundled", pytest.param("pystdlib-5m", marks=pytest.mark.slow)])
@pytest.mark.parametrize("pattern", [0.6, (2, 4)])
def test_trained_layers_lose_much_of_their_error_whatever_the_start(model, pattern, shared_folder) -> None:
    group, ratio = (pattern, 0.0) if isinstance(pattern, tuple) else (None, pattern)
    sums = dict.fromkeys(["wanda", "dsnot", "swaps", "swaps from magnitude"], 0.0)
    for weight, statistics in layers(BUNDLED if model == "bundled" else shared_folder("models", model)).values():
        dense = error(weight, torch.zeros_like(weight, dtype=torch.bool), statistics).sum()
        keep = start_of(weight, statistics, group, ratio)
        poor = start_of(weight, statistics, group, ratio, "magnitude")
        masks = {
            "wanda": keep,
            "dsnot": dsnot(weight, keep, statistics, group),
            "swaps": swaps(weight, keep, statistics, group),
            "swaps from magnitude": swaps(weight, poor, statistics, group),
        }
        for name, mask in masks.items():
            sums[name] += float(error(weight, mask, statistics).sum() / dense)
    assert sums["swaps"] < 0.85 * min(sums["wanda"], sums["dsnot"])
    assert sums["swaps from magnitude"] < 1.05 * sums["swaps"]


def test_statistics_without_a_gram_matrix_and_patterns_that_do_not_fit_are_refused() -> None:
    weight, statistics = layer(2, 8)
    keep = torch.ones(2, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="hessian=True"):
        swaps(weight, keep, InputStatistics(8))
    with pytest.raises(Refusal, match="groups of 3"):
        swaps(weight, keep, statistics, (2, 3))
    with pytest.raises(Refusal, match="shortlist 0"):
        swaps(weight, keep, statistics, shortlist=0)
