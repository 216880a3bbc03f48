"""DSnoT against a plain loop in float64, R²-DSnoT on trained weights, and what both keep whatever the weights."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trained import BUNDLED, error, layers

from espalier.stages.criteria.scoring import score
from espalier.stages.errors import Refusal
from espalier.stages.masks import keep_mask
from espalier.stages.refine import grow_and_prune as refine
from espalier.stages.refine.grow_and_prune import dsnot, r2_dsnot
from espalier.stages.refine.top_k import TopK
from espalier.stages.statistics import InputStatistics

quick = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
PATTERNS = [None, (2, 4), (1, 4), (3, 4), (4, 8), (6, 8)]
METHODS = {"dsnot": dsnot, "r2_dsnot": r2_dsnot}


def layer(rows: int, columns: int, seed: int = 0, shift: float = 0.4) -> tuple[torch.Tensor, InputStatistics]:
    generator = torch.Generator().manual_seed(seed)
    offset = torch.randn(columns, generator=generator) * shift
    statistics = InputStatistics(columns)
    statistics.update(torch.randn(3, 9, columns, generator=generator) + offset)
    return torch.randn(rows, columns, generator=generator), statistics


def start_of(weight, statistics, pattern, sparsity: float = 0.5) -> torch.Tensor:
    return keep_mask(score("wanda", weight, statistics), None if pattern else sparsity, pattern)


def plain_dsnot(weight, keep, statistics, pattern, cycles, threshold, scores) -> torch.Tensor:
    """One row and one cycle at a time, in float64, as the paper tells it."""
    mean, variance = statistics.mean_per_sample.double(), statistics.variance.double()
    wanda = weight.double().abs() * statistics.norm.double()
    refined = keep.clone()
    for row in range(len(weight)):
        gain = weight[row].double() * mean
        pruned, kept = set((~keep[row]).nonzero()[:, 0].tolist()), set(keep[row].nonzero()[:, 0].tolist())
        error = float(gain[~keep[row]].sum())
        side = math.copysign(1, error) if error else 0
        for _ in range(cycles):
            order = sorted(pruned, key=lambda j: -side * float(gain[j] / variance[j]))
            pair = None
            for grow in order:
                if pattern is None:
                    metric, able = wanda[row], [j for j in kept if side * gain[j] < 0]
                else:
                    metric, able = scores[row], [j for j in kept if j // pattern[1] == grow // pattern[1]]
                if able:
                    pair = grow, min(able, key=lambda j: float(metric[j]))
                    break
            if pair is None or abs(error) <= threshold:
                break
            error += float(gain[pair[1]] - gain[pair[0]])
            if error * side <= 0:
                break
            refined[row, pair[0]], refined[row, pair[1]] = True, False
            pruned.remove(pair[0])
            kept.remove(pair[1])
    return refined


@pytest.mark.parametrize("threshold", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("cycles", [1, 3, 50])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_dsnot_is_a_plain_loop_over_rows_and_cycles(pattern, cycles, threshold) -> None:
    moved = 0
    for seed in range(2):
        weight, statistics = layer(8, 48, seed)
        scores = score("magnitude", weight, statistics)
        keep = keep_mask(scores, None if pattern else 0.6, pattern)
        refined = dsnot(weight, keep, statistics, pattern, cycles=cycles, threshold=threshold, scores=scores)
        assert torch.equal(refined, plain_dsnot(weight, keep, statistics, pattern, cycles, threshold, scores))
        moved += int((refined != keep).sum())
    assert moved > 0


@pytest.mark.parametrize("method", METHODS)
def test_wide_rows_agree_with_the_loop_and_ones_that_go_far_do_too(method) -> None:
    weight, statistics = layer(3, 600, shift=3.0)
    keep = keep_mask(weight * statistics.mean_per_sample, 0.5)  # all that is pruned has one sign: ε is far from 0
    refined = METHODS[method](weight, keep, statistics)
    assert ((refined & ~keep).sum(1) > refine.FIRST_CYCLES).any()
    assert torch.equal(refined.sum(1), keep.sum(1))
    if method == "dsnot":
        assert torch.equal(refined, plain_dsnot(weight, keep, statistics, None, 50, 0.1, None))


@st.composite
def cases(draw):
    """Weights, statistics, pattern, mask; with rows and channels that hold nothing, or the same everywhere."""
    pattern = draw(st.sampled_from(PATTERNS))
    columns = draw(st.integers(1, 6)) * (pattern[1] if pattern else 3)
    weight, statistics = layer(draw(st.integers(1, 5)), columns, draw(st.integers(0, 2**31)), draw(st.floats(0, 5)))
    if draw(st.booleans()):
        weight[draw(st.integers(0, len(weight) - 1))] = draw(st.sampled_from([0.0, 1.0, -3.0]))
    if draw(st.booleans()):
        weight[:, draw(st.integers(0, columns - 1))] = 0
    dead = draw(st.booleans())
    if dead:
        statistics = InputStatistics(columns)
        x = torch.randn(1, 2, columns)  # fewer tokens than channels
        x[..., draw(st.integers(0, columns - 1))] = draw(st.sampled_from([0.0, 2.0]))  # dead, or never varies
        statistics.update(x)
    sparsity = draw(st.floats(0, 0.95))
    return weight, statistics, pattern, start_of(weight, statistics, pattern, sparsity)


@pytest.mark.parametrize("method", METHODS)
def test_zeros_of_every_row_and_group_stay_as_many(method) -> None:
    @quick
    @given(cases())
    def holds(case) -> None:
        weight, statistics, pattern, keep = case
        given_keep = keep.clone()
        refined = METHODS[method](weight, keep, statistics, pattern, threshold=0.0)
        assert torch.equal(keep, given_keep)
        assert (refined.dtype, refined.shape) == (torch.bool, keep.shape)
        width = pattern[1] if pattern else keep.shape[1]
        assert torch.equal(refined.unflatten(1, (-1, width)).sum(-1), keep.unflatten(1, (-1, width)).sum(-1))

    holds()


@pytest.mark.parametrize("method", METHODS)
def test_a_narrow_layer_keeps_two_of_four(method) -> None:
    weight, statistics = layer(40, 96, shift=2.0)
    keep = start_of(weight, statistics, (2, 4))
    refined = METHODS[method](weight, keep, statistics, (2, 4))
    assert not torch.equal(refined, keep)
    assert (refined.view(40, 24, 4).sum(-1) == 2).all()


@pytest.mark.parametrize("pattern", [None, (2, 4)])
@pytest.mark.parametrize("method", METHODS)
def test_chunks_of_rows_do_not_show(method, pattern, monkeypatch) -> None:
    weight, statistics = layer(37, 512, shift=1.0)
    keep = start_of(weight, statistics, pattern)
    whole = METHODS[method](weight, keep, statistics, pattern)
    assert not torch.equal(whole, keep)
    for chunk, batch, first in ((512, 1024, 12), (1536, 1 << 13, 3), (1 << 20, 1 << 20, 50)):
        monkeypatch.setattr(refine, "CHUNK_ELEMENTS", chunk)
        monkeypatch.setattr(refine, "BATCH_ELEMENTS", batch)
        monkeypatch.setattr(refine, "FIRST_CYCLES", first)
        assert torch.equal(METHODS[method](weight, keep, statistics, pattern), whole)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_weights_are_read_as_they_are(method) -> None:
    weight, statistics = layer(20, 64)
    half = weight.bfloat16()
    keep = start_of(half, statistics, None)
    expected = METHODS[method](half.float(), keep, statistics)
    assert torch.equal(METHODS[method](half, keep, statistics), expected)
    assert torch.equal(METHODS[method](torch.nn.Parameter(half), keep, statistics), expected)


@pytest.mark.parametrize("pattern", [None, (2, 4)])
@pytest.mark.parametrize("method", METHODS)
def test_expected_errors_shrink(method, pattern) -> None:
    weight, statistics = layer(64, 256, shift=1.0)
    keep = start_of(weight, statistics, pattern)
    gain = weight.double() * statistics.mean_per_sample.double()
    before = (gain * ~keep).sum(1).abs()
    after = (gain * ~METHODS[method](weight, keep, statistics, pattern)).sum(1).abs()
    assert after.sum() < 0.5 * before.sum()


def total(weight, keep, statistics) -> float:
    return float(error(weight, keep, statistics).sum() / error(weight, torch.zeros_like(keep), statistics).sum())


@pytest.mark.parametrize("model", ["bundled", pytest.param("pystdlib-5m", marks=pytest.mark.slow)])
@pytest.mark.parametrize("patterns", [(0.5, 0.6, 0.7), ((2, 4), (4, 8))], ids=["rows", "groups"])
def test_r2_dsnot_lowers_the_error_of_trained_layers_below_dsnot(model, patterns, shared_folder) -> None:
    directory = BUNDLED if model == "bundled" else shared_folder("models", model)
    sums = {"bare": 0.0, "dsnot": 0.0, "r2_dsnot": 0.0}
    for pattern in patterns:
        group = pattern if isinstance(pattern, tuple) else None
        for weight, statistics in layers(directory).values():
            keep = start_of(weight, statistics, group, 0 if group else pattern)
            sums["bare"] += total(weight, keep, statistics)
            for name, method in METHODS.items():
                sums[name] += total(weight, method(weight, keep, statistics, group), statistics)
    assert sums["r2_dsnot"] < sums["dsnot"]
    assert sums["r2_dsnot"] < 1.03 * sums["bare"]


def test_every_option_of_r2_dsnot_can_change_the_mask() -> None:
    weight, statistics = layer(200, 256, shift=1.0)
    keep = start_of(weight, statistics, None)
    plain = r2_dsnot(weight, keep, statistics)
    large = {"gamma_grow": 3.0, "gamma_prune": 3.0}
    strong = r2_dsnot(weight, keep, statistics, **large)
    for options in ({"relative": r} for r in ("prune", "both", "neither")):
        assert not torch.equal(r2_dsnot(weight, keep, statistics, **options), plain), options
    for options in ({"alpha": 1.0}, {"cycles": 1}, {"threshold": 20.0}, {"gamma_grow": 3.0}, {"gamma_prune": 300.0}):
        assert not torch.equal(r2_dsnot(weight, keep, statistics, **options), plain), options
    for p in (1, math.inf):
        assert not torch.equal(r2_dsnot(weight, keep, statistics, **large, p=p), strong)


@pytest.mark.parametrize(
    "options", [{"alpha": -0.1}, {"gamma_grow": -1.0}, {"gamma_prune": math.nan}, {"p": 0.5}, {"relative": "all"}]
)
def test_bad_options_are_refused(options) -> None:
    weight, statistics = layer(2, 8)
    with pytest.raises(Refusal, match=next(iter(options))):
        r2_dsnot(weight, torch.ones(2, 8, dtype=torch.bool), statistics, **options)
    with pytest.raises(Refusal, match="groups of 3"):
        dsnot(weight, torch.ones(2, 8, dtype=torch.bool), statistics, (2, 3))


@st.composite
def keys(draw) -> torch.Tensor:
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 90))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randint(0, draw(st.sampled_from([1, 3, 1000])), (rows, columns), generator=generator)
    if draw(st.booleans()):
        values = values.float()
        values[torch.rand(rows, columns, generator=generator) < draw(st.sampled_from([0, 0.5, 1]))] = torch.inf
    return values.to(torch.int32) if not values.is_floating_point() else values


@quick
@given(keys(), st.integers(1, 12), st.integers(1, 4))
def test_the_smallest_of_each_row_are_those_of_a_stable_sort(rows, count, step) -> None:
    smallest = TopK(count)
    for part in rows.split(step):
        smallest.add(part)
    values, columns = smallest.take()
    expected, order = rows.sort(dim=1, stable=True)
    assert torch.equal(values, expected[:, :count])
    real = values < torch.inf
    assert torch.equal(columns[real], order[:, :count][real])


def test_keys_above_the_last_are_no_candidates() -> None:
    row = torch.arange(400, 0, -1).float()[None]
    smallest = TopK(5, last=3.0)
    smallest.add(row)
    values, columns = smallest.take()
    assert values[0, :3].tolist() == [1, 2, 3]
    assert columns[0, :3].tolist() == [399, 398, 397]
    assert (values[0, 3:] > 3).all()
