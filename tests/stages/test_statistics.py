"""Statistics against float64 brute force, however the stream was cut."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.stages.errors import Refusal
from espalier.stages.statistics import InputStatistics

CHANNELS = 6


def inputs(samples: int, tokens: int, channels: int = CHANNELS, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, tokens, channels, generator=generator)
    return x * torch.linspace(0.1, 20, channels) + torch.linspace(-3, 3, channels)


def gathered(parts: list[torch.Tensor], hessian: bool = True) -> InputStatistics:
    statistics = InputStatistics(parts[0].shape[-1], hessian=hessian)
    for part in parts:
        statistics.update(part)
    return statistics


def assert_equal_to_brute_force(statistics: InputStatistics, parts: list[torch.Tensor], rtol: float = 1e-5) -> None:
    """Every sum and every derived quantity, from float64 copies of the samples."""
    samples = [sample.double() for part in parts for sample in part]
    tokens = torch.cat(samples)
    gram = tokens.T @ tokens
    variance = sum(len(s) * s.var(dim=0, unbiased=False) for s in samples) / len(tokens)
    close = {"rtol": rtol, "atol": 0.0}
    assert (statistics.tokens, statistics.samples) == (len(tokens), len(samples))
    scale = float(tokens.abs().sum(0).max())  # a sum may cancel: its error is judged against the terms
    torch.testing.assert_close(statistics.sum, tokens.sum(0), rtol=0, atol=1e-6 * scale)
    torch.testing.assert_close(statistics.sum_sq, tokens.square().sum(0), **close)
    torch.testing.assert_close(statistics.norm.double(), tokens.norm(dim=0), **close)
    torch.testing.assert_close(statistics.variance.double(), variance, rtol=10 * rtol, atol=1e-12)
    torch.testing.assert_close(
        statistics.mean_per_sample.double(), tokens.sum(0) / len(samples), rtol=0, atol=1e-6 * scale
    )
    if statistics.gram is not None:
        size = gram.diag().sqrt()
        error = (statistics.gram.double() - gram).abs() / (size[:, None] * size)
        assert float(error.max()) < rtol
        torch.testing.assert_close(statistics.hessian, statistics.gram * (2 / len(samples)))


@pytest.mark.parametrize(
    ("samples", "tokens", "channels"), [(5, 9, 6), (1, 1, 6), (3, 1, 1), (2, 300, 40), (1, 70, 5000)]
)
def test_sums_equal_float64(samples, tokens, channels) -> None:
    x = inputs(samples, tokens, channels)
    hessian = channels < 1000
    assert_equal_to_brute_force(gathered([x], hessian), [x])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=5), st.integers(1, 40), st.integers(0, 10**6))
def test_any_split_into_updates_gives_the_same_bits(counts, tokens, seed) -> None:
    x = inputs(sum(counts), tokens, seed=seed)
    parts = list(x.split(counts))
    whole, pieces = gathered([x]), gathered(parts)
    assert_equal_to_brute_force(pieces, parts)
    for name in ("sum", "sum_sq", "weighted_variance", "gram"):
        assert torch.equal(getattr(whole, name), getattr(pieces, name)), name


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 30)), min_size=1, max_size=5), st.integers(0, 10**6))
def test_merged_statistics_match_one_pass(shapes, seed) -> None:
    parts = [inputs(samples, tokens, seed=seed + number) for number, (samples, tokens) in enumerate(shapes)]
    merged = InputStatistics(CHANNELS, hessian=True)
    for part in parts:
        merged.merge(gathered([part]))
    assert_equal_to_brute_force(merged, parts)


def test_samples_of_unequal_length_are_weighted_by_their_tokens() -> None:
    parts = [inputs(1, 3, seed=1), inputs(2, 50, seed=2), inputs(1, 1, seed=3)]
    assert_equal_to_brute_force(gathered(parts), parts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype) -> None:
    x = inputs(4, 33).to(dtype)
    before = x.clone()
    assert_equal_to_brute_force(gathered([x]), [x])
    assert torch.equal(x, before)


def test_the_inputs_are_left_as_they_were() -> None:
    x = inputs(3, 400, 500)
    before = x.clone()
    gathered([x])
    assert torch.equal(x, before)


@pytest.mark.parametrize("tokens", [64, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_small_variance_on_a_large_mean(tokens, dtype) -> None:
    x = (torch.randn(4, tokens, 16, generator=torch.Generator().manual_seed(0)) + 1000.0).to(dtype)
    statistics = gathered([x], hessian=False)
    variance = torch.stack([sample.double().var(dim=0, unbiased=False) for sample in x]).mean(0)
    torch.testing.assert_close(statistics.variance.double(), variance, rtol=1e-3, atol=0)


def test_inside_an_autocast_region_the_sums_stay_exact() -> None:
    x = inputs(4, 33)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        statistics = gathered([x])
    plain = gathered([x])
    assert torch.equal(statistics.sum_sq, plain.sum_sq)
    assert torch.equal(statistics.hessian, plain.hessian)
    assert_equal_to_brute_force(statistics, [x])


def test_inputs_that_want_gradients_are_only_looked_at() -> None:
    x = inputs(2, 5).requires_grad_()
    statistics = gathered([x])
    assert not statistics.sum.requires_grad
    assert not statistics.gram.requires_grad


def test_a_constant_channel_has_no_variance() -> None:
    x = torch.full((3, 100, 2), 7.0)
    x[..., 1] = 0
    statistics = gathered([x])
    assert statistics.variance.tolist() == [0.0, 0.0]
    assert statistics.norm[1] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("token", [0, 17, 399])
def test_a_bad_input_names_its_sample_and_channel(bad, token) -> None:
    statistics = InputStatistics(500)
    statistics.update(inputs(2, 400, 500))
    x = inputs(3, 400, 500)
    x[2, token, 123] = bad
    x[2, token, 200] = bad
    with pytest.raises(Refusal, match="sample 4: NaN or infinity in its inputs, first in channel 123"):
        statistics.update(x)


def test_a_flat_batch_counts_as_one_sample() -> None:
    x = inputs(1, 7)[0]
    assert_equal_to_brute_force(gathered([x[None]]), [x[None]])
    flat = InputStatistics(CHANNELS)
    flat.update(x)
    assert (flat.samples, flat.tokens) == (1, 7)


def test_what_does_not_fit_together_is_an_error() -> None:
    with pytest.raises(ValueError, match="7 channels, these statistics 6"):
        InputStatistics(6).update(torch.ones(1, 2, 7))
    with pytest.raises(ValueError, match="cannot merge"):
        InputStatistics(6).merge(InputStatistics(7))
    with pytest.raises(ValueError, match="cannot merge"):
        InputStatistics(6).merge(InputStatistics(6, hessian=True))
    with pytest.raises(ValueError, match="hessian=True"):
        _ = InputStatistics(6).hessian
    with pytest.raises(ValueError, match="cannot merge"):
        InputStatistics(6).merge(InputStatistics(6, out_features=3))
    with pytest.raises(ValueError, match="out_features"):
        InputStatistics(6).update(torch.ones(1, 2, 6), torch.ones(1, 2, 3))
    with pytest.raises(ValueError, match="out_features"):
        InputStatistics(6, out_features=3).update(torch.ones(1, 2, 6))
    with pytest.raises(ValueError, match=r"expect \(1, 2, 3\)"):
        InputStatistics(6, out_features=3).update(torch.ones(1, 2, 6), torch.ones(1, 2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [500, 1100])  # below one panel of rows, and above two
def test_the_gram_is_symmetric_and_as_exact_as_float32_sums(dtype, channels) -> None:
    x = inputs(2, 700, channels).to(dtype)
    statistics = gathered([x[:1], x[1:]])
    tokens = x.double().flatten(0, 1)
    gram = tokens.T @ tokens
    size = gram.diag().sqrt()
    assert torch.equal(statistics.gram, statistics.gram.T)
    assert float(((statistics.gram.double() - gram) / (size[:, None] * size)).abs().max()) < 2e-6
    statistics.update(x)  # after it was read, and mirrored
    assert float(((statistics.gram.double() - 2 * gram) / (size[:, None] * size)).abs().max()) < 4e-6


def test_the_gram_of_bfloat16_inputs_is_not_rounded_to_bfloat16() -> None:
    x = inputs(1, 512, 64).to(torch.bfloat16)
    gram = gathered([x]).gram
    assert int((gram != gram.bfloat16()).sum()) > 0.9 * gram.numel()


def test_precision_of_other_products_is_as_before_after_an_update() -> None:
    a = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    before = a @ a
    gathered([inputs(1, 64, 300).to(torch.bfloat16)])
    assert torch.equal(a @ a, before)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=5), st.integers(1, 40), st.integers(0, 10**6))
def test_output_norms_from_sums_and_from_the_gram_equal_float64(counts, tokens, seed) -> None:
    x = inputs(sum(counts), tokens, seed=seed)
    weight = torch.randn(9, CHANNELS, generator=torch.Generator().manual_seed(seed))
    y = x @ weight.T
    counted, merged = (InputStatistics(CHANNELS, out_features=9) for _ in range(2))
    counted.update(x, y)
    for x_part, y_part in zip(x.split(counts), y.split(counts), strict=True):
        part = InputStatistics(CHANNELS, out_features=9)
        part.update(x_part, y_part)
        merged.merge(part)
    expected = y.double().flatten(0, 1).norm(dim=0)
    for statistics in (counted, merged):
        torch.testing.assert_close(statistics.output_norm(weight).double(), expected, rtol=1e-5, atol=0)
    scale = float((weight.double().norm(dim=1) * x.double().norm()).max())  # a sum over inputs may cancel
    from_gram = gathered([x]).output_norm(weight).double()
    torch.testing.assert_close(from_gram, expected, rtol=0, atol=1e-3 * scale)


def test_the_gram_gives_output_norms_of_low_precision_weights_in_float32() -> None:
    x = inputs(2, 50, 600)
    weight = torch.randn(700, 600, generator=torch.Generator().manual_seed(1)).bfloat16()
    norm = gathered([x]).output_norm(weight)
    assert norm.dtype == torch.float32
    expected = (x.double() @ weight.double().T).flatten(0, 1).norm(dim=0)
    torch.testing.assert_close(norm.double(), expected, rtol=1e-4, atol=0)


def test_output_norms_that_nothing_was_kept_for_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"out_features=\.\.\. or hessian=True"):
        InputStatistics(6).output_norm(torch.ones(3, 6))
    with pytest.raises(ValueError, match="3 channels were counted, not 4"):
        InputStatistics(6, out_features=3).output_norm(torch.ones(4, 6))


def test_a_bad_output_names_its_sample_and_channel() -> None:
    y = torch.ones(2, 5, 3)
    y[1, 4, 2] = math.inf
    with pytest.raises(Refusal, match="sample 1: NaN or infinity in its outputs, first in channel 2"):
        InputStatistics(6, out_features=3).update(inputs(2, 5), y)
