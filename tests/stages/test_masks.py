"""Masks against a full stable sort, on matrices full of ties, and what is refused."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pretended_device import NAME, PretendedDevice

from espalier.stages import masks
from espalier.stages.errors import Refusal
from espalier.stages.masks import check_divisible, check_pattern, check_sparsity, keep_mask, masked

quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def by_full_sort(rows: torch.Tensor, drop: int) -> torch.Tensor:
    """The obvious way: sort each row in float64, ties in order, and drop the first."""
    order = rows.double().sort(dim=-1, stable=True).indices
    keep = torch.ones_like(rows, dtype=torch.bool)
    return keep.scatter_(-1, order[:, :drop], False)


@st.composite
def matrices(draw, multiple: int = 1) -> torch.Tensor:
    rows, columns = draw(st.integers(1, 7)), draw(st.integers(1, 12)) * multiple
    levels = draw(st.sampled_from([1, 2, 3, 1000]))  # 1: all equal; 2, 3: mostly ties
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randint(0, levels, (rows, columns), generator=generator).float() / 7
    if draw(st.booleans()):
        values[draw(st.integers(0, rows - 1))] = 0.0
    if draw(st.booleans()):
        values[draw(st.integers(0, rows - 1))] = 5.0
    return values


@quick
@given(matrices(), st.floats(0, 0.999))
def test_rows_lose_exactly_the_lowest(scores, sparsity) -> None:
    drop = int(scores.shape[-1] * sparsity)
    keep = keep_mask(scores, sparsity)
    assert (keep.dtype, keep.shape) == (torch.bool, scores.shape)
    assert ((~keep).sum(-1) == drop).all()
    assert torch.equal(keep, by_full_sort(scores, drop))


@quick
@given(matrices(), st.floats(0, 0.999))
def test_a_matrix_loses_exactly_its_lowest(scores, sparsity) -> None:
    drop = int(scores.numel() * sparsity)
    keep = keep_mask(scores, sparsity, scope="matrix")
    assert int((~keep).sum()) == drop
    assert torch.equal(keep.reshape(1, -1), by_full_sort(scores.reshape(1, -1), drop))


@pytest.mark.parametrize("levels", [1, 3, 1000, None], ids=["equals", "ties", "few-ties", "none"])
def test_a_large_matrix_loses_exactly_its_lowest(levels) -> None:
    """Where its threshold lies is looked for between two of a sample's scores."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(310, 450, generator=generator)
    assert scores.numel() > masks.CHUNK_ELEMENTS
    if levels:
        scores = torch.randint(0, levels, scores.shape, generator=generator).float()
    for sparsity in (1e-5, 0.003, 0.5, 0.83, 0.999995):
        keep = keep_mask(scores, sparsity, scope="matrix")
        assert torch.equal(keep.reshape(1, -1), by_full_sort(scores.reshape(1, -1), int(scores.numel() * sparsity)))


def test_the_nth_lowest_is_found_where_a_sample_leads_astray(monkeypatch) -> None:
    monkeypatch.setattr(masks, "CHUNK_ELEMENTS", 1000)
    scores = torch.arange(5000.0).view(50, 100)
    for sampled in (1, 2, 50):
        monkeypatch.setattr(masks, "SAMPLED", sampled)
        for nth in (1, 2, 2500, 4998, 4999):
            assert torch.equal(keep_mask(scores, (nth + 0.5) / 5000, scope="matrix"), scores >= nth)


@pytest.mark.parametrize(
    "pattern", [(2, 4), (4, 8), (1, 4), (3, 4), (6, 8), (1, 1), (4, 4), (8, 16), (14, 16), (5, 12)]
)
def test_every_group_keeps_exactly_its_n_best(pattern) -> None:
    @quick
    @given(matrices(multiple=pattern[1]))
    def check(scores: torch.Tensor) -> None:
        keep = keep_mask(scores, pattern=pattern)
        groups = keep.reshape(-1, pattern[1])
        assert (groups.sum(-1) == pattern[0]).all()
        assert torch.equal(groups, by_full_sort(scores.reshape(groups.shape), pattern[1] - pattern[0]))

    check()


def test_selection_in_chunks_equals_selection_at_once(monkeypatch) -> None:
    scores = torch.randint(0, 9, (50, 24), generator=torch.Generator().manual_seed(0)).float()
    whole = keep_mask(scores, 0.4)
    for elements in (1, 24, 100, 24 * 50):
        monkeypatch.setattr(masks, "CHUNK_ELEMENTS", elements)
        assert torch.equal(keep_mask(scores, 0.4), whole)


@quick
@given(matrices(multiple=4), st.floats(0.01, 0.999))
def test_what_a_gpu_runs_gives_the_same_masks(scores, sparsity) -> None:
    with PretendedDevice():
        there = scores.to(NAME)
        rows, matrix = keep_mask(there, sparsity).cpu(), keep_mask(there, sparsity, scope="matrix").cpu()
        groups = keep_mask(there, pattern=(3, 4)).cpu()
    assert torch.equal(rows, by_full_sort(scores, int(scores.shape[-1] * sparsity)))
    flat = scores.reshape(1, -1)
    assert torch.equal(matrix.reshape(1, -1), by_full_sort(flat, int(flat.shape[-1] * sparsity)))
    assert torch.equal(groups.reshape(-1, 4), by_full_sort(scores.reshape(-1, 4), 1))


def test_the_scores_are_left_as_they_were() -> None:
    scores = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    before = scores.clone()
    for choice in ({"sparsity": 0.5}, {"pattern": (2, 4)}, {"sparsity": 0.5, "scope": "matrix"}):
        keep_mask(scores, **choice)
        assert torch.equal(scores, before)


def test_a_transposed_view_gives_the_mask_of_its_copy() -> None:
    scores = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)).T
    for choice in ({"sparsity": 0.5}, {"pattern": (2, 4)}, {"sparsity": 0.5, "scope": "matrix"}):
        assert torch.equal(keep_mask(scores, **choice), keep_mask(scores.contiguous(), **choice))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_a_ratio_outside_its_range_is_refused(sparsity) -> None:
    with pytest.raises(Refusal, match=rf"sparsity {sparsity}: .*at least 0 and below 1"):
        check_sparsity(sparsity)
    with pytest.raises(Refusal):
        keep_mask(torch.ones(2, 4), sparsity)


@pytest.mark.parametrize("pattern", [(3, 2), (0, 4), (-1, 4), (0, 0)])
def test_a_pattern_that_makes_no_sense_is_refused(pattern) -> None:
    with pytest.raises(Refusal, match=rf"pattern {pattern[0]}:{pattern[1]}: .*1 <= N <= M"):
        check_pattern(pattern)
    with pytest.raises(Refusal):
        keep_mask(torch.ones(2, 4), pattern=pattern)


def test_rows_that_groups_do_not_fill_are_refused_with_the_numbers() -> None:
    with pytest.raises(Refusal, match=r"mlp\.down_proj: 10 inputs cannot be cut into groups of 4.* 2:4 "):
        check_divisible(10, (2, 4), "mlp.down_proj")
    with pytest.raises(Refusal, match="10 inputs"):
        keep_mask(torch.ones(2, 10), pattern=(2, 4))


def test_one_of_a_ratio_a_pattern_and_a_threshold() -> None:
    for several in ({}, {"sparsity": 0.5, "pattern": (2, 4)}, {"pattern": (2, 4), "threshold": 1.0}):
        with pytest.raises(ValueError, match="one of"):
            keep_mask(torch.ones(2, 4), **several)


def test_nothing_goes_at_ratio_zero() -> None:
    assert keep_mask(torch.zeros(3, 5), 0.0).all()
    assert keep_mask(torch.zeros(3, 5), 0.19).all()  # int(5 · 0.19) = 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_weights_are_plus_zero_and_the_others_keep_their_bits(dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 24, generator=generator).to(dtype)
    weight[0] = -0.0
    keep = torch.rand(9, 24, generator=generator) > 0.5
    before, integers = weight.clone(), torch.int32 if dtype == torch.float32 else torch.int16
    result = masked(weight, keep)
    expected = torch.where(keep, before.view(integers), torch.zeros((), dtype=integers))
    assert result.dtype == dtype
    assert torch.equal(result.view(integers), expected)
    assert torch.equal(weight.view(integers), before.view(integers))
