"""The shadow tracker against a float64 sum; its rounding against its bound; cut anywhere, saved and gone on with."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from espalier.stages.errors import Refusal
from espalier.stages.shadow import formats as shadow_formats
from espalier.stages.shadow import tracker as shadow
from espalier.stages.shadow.spec import ShadowSpec, share
from espalier.stages.shadow.tracker import ShadowTracker

SCHEDULES = ("linear", "exponential", "uniform")
FORMATS = [("fp32", "stochastic"), ("bf16", "stochastic"), ("bf16", "compensated"), ("int8", "stochastic")]
DECAY = 0.9


def walk(steps: int, shape: tuple[int, ...] = (5, 211), stride: float = 0.02, seed: int = 0) -> Iterator[Tensor]:
    """A weight that moves at random."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    for _ in range(steps):
        weight = weight + stride * torch.randn(shape, generator=generator)
        yield weight


def track(tracker: ShadowTracker, weight: Tensor, snapshots: Iterator[Tensor]) -> Tensor:
    """What a tracker of `weight` (or of slices of it) says once `weight` has been each of the snapshots."""
    for snapshot in snapshots:
        weight.copy_(snapshot)
        tracker.update()
    return torch.cat([q.reshape(-1) for q in tracker.importance().values()]).view(weight.shape)


def multipliers(schedule: str, count: int) -> list[float]:
    """m_n as methods §8 writes them, in float64: overflows in long runs."""
    return [{"linear": n + 1.0, "exponential": DECAY**-n, "uniform": 1.0}[schedule] for n in range(count)]


def brute_force(snapshots: list[Tensor], schedule: str, signed: bool, window: int | None) -> Tensor:
    counted = slice(-window if window else None, None)
    weights = multipliers(schedule, len(snapshots))[counted]
    values = [p.double() if signed else p.double().abs() for p in snapshots[counted]]
    return (sum(m * p for m, p in zip(weights, values, strict=True)) / sum(weights)).abs()


def largest_step(weights: Tensor, dtype: str) -> Tensor:
    """h of each weight: of bf16 that of the largest value a weight had, of int8 that of its block's largest."""
    largest = weights.abs().amax(0)
    if dtype == "bf16":
        return torch.exp2(torch.frexp(largest).exponent - 8.0)
    flat = torch.nn.functional.pad(largest.view(-1), (0, -largest.numel() % 128))
    return (flat.view(-1, 128).amax(1).repeat_interleave(128)[: largest.numel()] * 1.125 / 127).view(largest.shape)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("dtype", "rounding"), FORMATS)
def test_importance_is_the_weighted_mean_within_the_bound(dtype, rounding, schedule, signed, window) -> None:
    steps = 40
    snapshots = list(walk(steps))
    weight = torch.empty_like(snapshots[0])
    options = {"schedule": schedule, "decay": DECAY, "signed": signed, "window": window}
    tracker = ShadowTracker([("w", weight)], **options, dtype=dtype, rounding=rounding)
    error = track(tracker, weight, iter(snapshots)).double() - brute_force(snapshots, schedule, signed, window)
    history = torch.stack(snapshots)
    if dtype == "fp32":
        assert error.abs().max() < 1e-6 * history.abs().max()
        return
    if rounding == "compensated":
        sums = list(itertools.accumulate(multipliers(schedule, steps)))
        roundings = 1 if window else sum(sums) / sums[-1]
        assert (error.abs() <= 2**-16 * roundings * history.abs().amax(0) + 1e-6).all()
        return
    step = largest_step(history, dtype)
    if window:
        assert (error.abs() <= step + 1e-6).all()
        return
    moved = (history - history[0]).abs().amax(0) / step + 1  # |p - q| at most, in steps: q lies among the p before
    grown = math.log(1.1 * history.abs().max() / snapshots[0].abs().mean(), 1.125) if dtype == "int8" else 0
    bound = (2 * moved + (1 + grown) / 4).sqrt()
    shares = error / step
    assert shares.square().mean().sqrt() <= bound.square().mean().sqrt()
    assert shares.abs().max() <= 6 * bound.max()
    assert abs(shares.mean()) < 5 * shares.std() / math.sqrt(shares.numel())  # unbiased


@pytest.mark.parametrize(("dtype", "rounding"), FORMATS)
def test_updates_far_below_a_step_are_not_lost(dtype: str, rounding: str) -> None:
    """After 300 times 1 comes 300 times 1.05: each of those moves the mean by less than a tenth of an int8 step."""
    ones = torch.ones(4096)
    snapshots = itertools.chain(itertools.repeat(ones, 300), itertools.repeat(1.05 * ones, 300))
    weight = ones.clone()
    q = track(
        ShadowTracker([("w", weight)], schedule="uniform", dtype=dtype, rounding=rounding, seed=3), weight, snapshots
    )
    assert float(q.mean()) == pytest.approx(1.025, abs=1e-3)
    assert q.std() < 0.02


def test_a_hundred_thousand_exponential_updates_overflow_nothing() -> None:
    weight = torch.tensor([1.0, -2.0])
    trackers = [
        ShadowTracker([("w", weight)], schedule="exponential", decay=0.5, dtype=dtype, window=window)
        for dtype, window in (("fp32", None), ("int8", None), ("fp32", 3))
    ]
    for tracker in trackers:
        for number in range(1_100):
            tracker.updates = number if number < 100 else 98_900 + number
            tracker.update()
        assert tracker.updates == 100_000
        torch.testing.assert_close(tracker.importance()["w"], torch.tensor([1.0, 2.0]), rtol=0, atol=0.05)
    assert share("exponential", 0.99, 10**9) == pytest.approx(0.01)
    assert sum(share("exponential", 0.9, n) for n in (0, 1)) == pytest.approx(1 + 1 / 1.9)


def test_a_window_forgets_what_is_older_whatever_it_was() -> None:
    """A huge old snapshot leaves no trace, as it would in a sum that it was added to and subtracted from."""
    last = list(walk(3))
    for dtype in ("fp32", "bf16", "int8"):
        results = []
        for first in (torch.full((5, 211), 1e30), torch.zeros(5, 211)):
            weight = torch.empty(5, 211)
            tracker = ShadowTracker([("w", weight)], window=3, dtype=dtype)
            results.append(track(tracker, weight, iter([first, first, *last])))
        assert torch.equal(*results)


def slices(weight: Tensor, cuts: list[int]) -> list[tuple[str, Tensor]]:
    flat = weight.view(-1)
    return [(f"w@{low}", flat[low:high]) for low, high in itertools.pairwise([0, *cuts, flat.numel()])]


@pytest.mark.parametrize(
    ("dtype", "rounding", "cuts"),
    [(*form, [1, 130, 16385, 40001]) for form in FORMATS[:3]] + [("int8", "stochastic", [128, 16512, 40064])],
)
def test_parameters_cut_into_slices_give_the_same_bits(
    dtype: str, rounding: str, cuts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name, size in (
        (shadow_formats, "CHUNK", 1 << 14),
        (shadow, "CHUNK", 1 << 14),
        (shadow, "STRIP", 1 << 15),
    ):
        monkeypatch.setattr(module, name, size)
    snapshots = list(walk(6, (3, 17_000)))
    whole, cut = torch.empty(3, 17_000), torch.empty(3, 17_000)
    options = {"dtype": dtype, "rounding": rounding, "seed": 7}
    one = track(ShadowTracker([("w", whole)], **options), whole, iter(snapshots))
    two = track(ShadowTracker(slices(cut, cuts), **options), cut, iter(snapshots))
    behind = track(ShadowTracker(slices(cut, cuts), **options, background=True), cut, iter(snapshots))
    assert torch.equal(one, two) and torch.equal(one, behind)


@pytest.mark.parametrize(("dtype", "rounding"), FORMATS)
def test_what_lies_on_the_grid_stays_as_it_is(dtype: str, rounding: str) -> None:
    weight = torch.rand(100_000)
    tracker = ShadowTracker([("w", weight)], dtype=dtype, rounding=rounding)
    kept = track(tracker, weight, iter([weight.clone()]))
    assert torch.equal(track(tracker, weight, itertools.repeat(kept, 20)), kept)


@pytest.mark.parametrize(("dtype", "rounding"), FORMATS)
def test_torchs_threads_do_not_show(dtype: str, rounding: str) -> None:
    results = []
    for threads in (2, 1):  # torch divides what is longer than 2¹⁵ among them
        torch.set_num_threads(threads)
        weight = torch.empty(3, 50_001)
        tracker = ShadowTracker([("w", weight)], dtype=dtype, rounding=rounding)
        results.append(track(tracker, weight, walk(4, (3, 50_001))))
    assert torch.equal(*results)


def test_int8_differs_only_in_blocks_that_a_cut_goes_through() -> None:
    snapshots = list(walk(6, (1, 1024)))
    whole, cut = torch.empty(1, 1024), torch.empty(1, 1024)
    one = track(ShadowTracker([("w", whole)], dtype="int8"), whole, iter(snapshots))
    two = track(ShadowTracker(slices(cut, [300]), dtype="int8"), cut, iter(snapshots))
    differing = (one != two).view(-1).nonzero()[:, 0]
    assert len(differing) and (differing // 128).unique().tolist() == [2]
    assert (one - two).abs().max() < 0.3


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("dtype", "rounding"), FORMATS)
def test_saved_half_way_and_cut_otherwise_it_goes_on_to_the_same_bits(dtype, rounding, window, tmp_path: Path) -> None:
    snapshots = list(walk(9, (4, 300)))
    options = {"dtype": dtype, "rounding": rounding, "window": window, "seed": 5}
    weight = torch.empty(4, 300)
    expected = track(ShadowTracker([("w", weight)], **options), weight, iter(snapshots))
    parts = slices(weight, [256])
    ranks = [ShadowTracker([part], **options) for part in parts]
    for snapshot in snapshots[:5]:
        weight.copy_(snapshot)
        for rank in ranks:
            rank.update()
    files = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for rank, file in zip(ranks, files, strict=True):
        rank.save(file)
    resumed = ShadowTracker(slices(weight, [128, 640]), **options)
    resumed.load(*files)
    assert resumed.updates == 5
    assert torch.equal(track(resumed, weight, iter(snapshots[5:])), expected)
    with pytest.raises(Refusal, match=r"w@640 has 560 weights, 0 of them|w@128 has 512 weights, 128 of them"):
        ShadowTracker(slices(weight, [128, 640]), **options).load(files[0])
    with pytest.raises(Refusal, match="saved with seed 5, now 6"):
        ShadowTracker(parts, **options | {"seed": 6}).load(*files)


def test_memory_is_what_the_format_says() -> None:
    weight = torch.zeros(1 << 14)
    sizes = [ShadowTracker([("w", weight)], dtype=d, rounding=r).nbytes / weight.numel() for d, r in FORMATS]
    assert sizes == [4, 2, 3, 1 + 4 / 128]
    assert ShadowTracker([("w", weight)], dtype="bf16", window=3).nbytes == 6 * weight.numel()


def test_bf16_weights_and_empty_slices_are_tracked() -> None:
    weight = torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16)
    tracker = ShadowTracker([("w", weight), ("v@128", torch.empty(0))])
    tracker.update()
    importance = tracker.importance()
    assert importance["w"].tolist() == [[1.5, 2.0]] and importance["w"].dtype == torch.float32
    assert importance["v@128"].numel() == 0


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"dtype": "int8"}, {"background": True}])
def test_a_weight_that_is_not_finite_is_refused_by_name(options: dict[str, object]) -> None:
    weight = torch.ones(3)
    tracker = ShadowTracker([("layer.w", weight)], **options)
    tracker.update()
    weight[1] = math.nan
    with pytest.raises(Refusal, match=r"layer.w holds NaN or infinity at snapshot 1"):
        tracker.update()
        tracker.importance()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "cubic"}, "schedule 'cubic': choose linear, exponential, uniform"),
        ({"decay": 1.0}, "decay 1.0: must be above 0 and below 1"),
        ({"window": 0}, "window 0: must be at least 1"),
        ({"every": 0}, "every 0: must be at least 1"),
        ({"rounding": "compensated"}, "compensated with dtype fp32"),
    ],
)
def test_what_cannot_be_averaged_so_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        ShadowSpec(**options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "rounding"), FORMATS)
def test_a_device_gives_the_bits_that_the_cpu_gives(dtype: str, rounding: str) -> None:
    snapshots = list(walk(4, (3, 2_000_000)))
    results = []
    for device in ("cpu", "cuda"):
        weight = torch.empty(3, 2_000_000, device=device)
        results.append(track(ShadowTracker([("w", weight)], dtype=dtype, rounding=rounding), weight, iter(snapshots)))
    assert torch.equal(results[0], results[1].cpu())
