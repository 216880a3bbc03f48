"""Copies between the host and a device: through page-locked memory, beside the computing, awaited where they are read.

The pretended device makes every copy as late as it may, so a wait that is missing is a wrong number.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pretended_streams
import pytest
import torch
from family_models import LAYERS, family_checkpoint
from pretended_device import DEVICE, NAME, PretendedDevice
from pretended_streams import Event, Stream, Unordered
from safetensors.torch import save_file
from streaming import GENTLE, begin, bits, make_shards, microbatches, prune, same_bits, stream
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from espalier.cluster.transport import pack, unpack
from espalier.stages.errors import Refusal
from espalier.stages.recipe import BlockTask, Recipe
from espalier.stages.storage import staging
from espalier.stages.storage.hf_checkpoint import Checkpoint
from espalier.stages.storage.spool import Spool, SpoolBudget
from espalier.stages.storage.staging import download, lane_to, prefetch, to_host, upload

LENGTH, SAMPLES = 12, 9
SMALL = 1 << 12  # bytes of a slab that the tests' tensors fill again and again


@pytest.fixture(autouse=True)
def plain_attention() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture
def device() -> Iterator[PretendedDevice]:
    with PretendedDevice() as made:
        yield made


@pytest.fixture
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "SLAB", SMALL)


def samples(count: int, length: int = LENGTH) -> Tensor:
    return torch.randn(count, length, 32, generator=torch.Generator().manual_seed(count))


# -- the pretended device's own word ----------------------------------------------------------------------------------


def test_a_copy_that_nobody_waited_for_has_not_come(device: PretendedDevice) -> None:
    module = torch.get_device_module(NAME)
    far, slab = samples(2).to(DEVICE), torch.empty(2, LENGTH, 32, pin_memory=True)
    aside = module.Stream(DEVICE)
    aside.wait_event(module.current_stream().record_event())
    far.record_stream(aside)
    with module.stream(aside):
        slab.copy_(far, non_blocking=True)
    event = aside.record_event()
    assert slab.isnan().all() and not event.query()
    event.synchronize()
    assert torch.equal(slab, samples(2)) and event.query()
    with module.stream(aside):
        there = torch.empty(2, LENGTH, 32, device=DEVICE)
        there.copy_(slab, non_blocking=True)
    ended = aside.record_event()
    slab.zero_()  # too early
    module.current_stream().wait_event(ended)
    there.record_stream(module.current_stream())
    assert not there.cpu().any()


def test_streams_that_do_not_wait_for_each_other_are_refused(device: PretendedDevice) -> None:
    module = torch.get_device_module(NAME)
    aside, slab = module.Stream(DEVICE), torch.empty(2, LENGTH, 32, pin_memory=True)
    far = samples(2).to(DEVICE)
    with module.stream(aside), pytest.raises(Unordered, match="record_stream"):
        slab.copy_(far, non_blocking=True)
    far.record_stream(aside)
    with module.stream(aside), pytest.raises(Unordered, match="has not waited"):
        slab.copy_(far, non_blocking=True)
    with module.stream(aside):
        there = torch.ones(3, device=DEVICE)
    with pytest.raises(Unordered, match="record_stream"):
        there + 1


def test_copies_are_counted_by_memory_and_by_who_waits(device: PretendedDevice) -> None:
    near, locked = samples(1), torch.empty(1, LENGTH, 32, pin_memory=True)
    assert device.streams.locked_bytes == locked.nbytes
    far = near.to(DEVICE, non_blocking=True)  # pageable: nothing is gained
    far.copy_(locked)
    locked.copy_(far, non_blocking=True)
    far.cpu()
    kinds = sorted(place.split(" at ")[0] for place in device.copies.elements())
    pageable = ["pageable down, waited for", "pageable up, waited for"]
    assert kinds == ["page-locked down", "page-locked up, waited for", *pageable]
    torch.get_device_module(NAME).current_stream().record_event().synchronize()
    del locked
    assert device.streams.locked_bytes == 0


# -- slabs ------------------------------------------------------------------------------------------------------------


def test_on_a_cpu_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a lane on a CPU")

    monkeypatch.setattr(staging, "Lane", refuse)
    tensor, got = samples(2), []
    assert lane_to("cpu") is None
    assert upload(tensor, "cpu") is tensor
    assert download(tensor, got.append) is None and got[0] is tensor
    assert to_host([tensor])[0].data_ptr() == tensor.data_ptr()
    made = []

    def make(room: Any) -> Tensor:
        assert room is None
        made.append(1)
        return tensor

    (given,) = next(prefetch([[make]], "cpu"))
    assert not made  # when it is asked for
    assert given() is tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_bits_go_up_and_come_down_unchanged(device: PretendedDevice, small_slabs: None, dtype: torch.dtype) -> None:
    """Through slabs that they fill several times, larger tensors than a slab and empty ones among them."""
    tensors = [samples(n).mul(100).to(dtype) for n in (1, 7, 0, 2, 40, 3)]
    place = staging.placing(NAME)
    for far in (lambda t: upload(t, NAME), lambda t: place(t, t.dtype)):
        there = [far(tensor) for tensor in tensors]
        assert all(tensor.device == DEVICE for tensor in there)
        assert all(same_bits(near, tensor) for near, tensor in zip(to_host(there), tensors, strict=True))
    assert not [place for place in device.copies if "pageable" in place]
    assert device.streams.locked_bytes <= 2 * staging.SLABS * (SMALL + 40 * LENGTH * 32 * 8)


def test_slabs_are_few_and_used_again(device: PretendedDevice, small_slabs: None) -> None:
    spool = staging.lane_to(NAME)
    assert spool is not None
    got: list[float] = []
    for number in range(50):
        download(torch.full((1, LENGTH, 32), float(number), device=DEVICE), lambda t: got.append(float(t.mean())))
    assert len(got) >= 40  # what lay in a slab was handed over before it was filled anew
    spool.settle()
    assert got == list(range(50))
    assert device.streams.locked_bytes == staging.SLABS * SMALL


def test_what_is_sent_ahead_comes_in_order_and_one_ahead(device: PretendedDevice, small_slabs: None) -> None:
    parts = list(samples(30).split(3))
    begun: list[int] = []

    def maker(number: int) -> staging.Make:
        def make(room: staging.Room | None) -> Tensor:
            assert room is not None
            begun.append(number)
            return torch.mul(parts[number], 2, out=room(parts[number].shape, torch.float32))

        return make

    for number, (given,) in enumerate(prefetch(([maker(n)] for n in range(len(parts))), NAME)):
        assert begun[-1] == min(number + 1, len(parts) - 1)
        with device.counted() as waits:
            far = given()
        assert not waits  # the computing waits, not the host
        assert torch.equal(far.cpu(), parts[number] * 2)
    assert device.streams.ahead == len(parts) - 1


def test_hidden_states_travel_through_slabs(device: PretendedDevice) -> None:
    for tensor in (samples(3), samples(3).bfloat16()):
        packed = pack(tensor.to(DEVICE))
        packed.setflags(write=False)
        far = unpack(packed, NAME)
        assert far.device == DEVICE and same_bits(far.cpu(), tensor)
        assert same_bits(unpack(packed), tensor)
        again = pack(torch.zeros(3, LENGTH, 32, device=DEVICE))
        assert np.any(packed) and not np.any(again)  # memory of its own


# -- spools -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fits", [0, 5, 100], ids=["disk", "mixed", "memory"])
def test_a_spool_takes_in_what_a_device_holds(
    device: PretendedDevice, small_slabs: None, tmp_path: Path, fits: int
) -> None:
    data = samples(24)
    budgets = [SpoolBudget(fits * data[0].nbytes) for _ in range(2)]
    far, near = (Spool(tmp_path / name, budget) for name, budget in zip(("far", "near"), budgets, strict=True))
    for part in data.split(2):
        held = part.to(DEVICE)
        far.append(held)
        held.zero_()  # as a model may write over its activations
        near.append(part)
        assert len(far) == len(near) and budgets[0].used == budgets[1].used
    far.append(data[:1])  # from the host, behind what is still on its way
    near.append(data[:1])
    assert [bits(far[n]) for n in (24, 0, 7, 13, 5, 23)] == [bits(near[n]) for n in (24, 0, 7, 13, 5, 23)]
    assert far.disk_bytes == near.disk_bytes
    assert not [place for place in device.copies if "pageable down" in place]


def test_a_spool_that_is_closed_takes_in_nothing_more(device: PretendedDevice, tmp_path: Path) -> None:
    budget = SpoolBudget(1 << 20)
    first, second = Spool(tmp_path / "first", budget), Spool(tmp_path / "second", budget)
    first.append(samples(2).to(DEVICE))
    second.append(samples(3).to(DEVICE))
    first.close()
    assert torch.equal(second.batch([0, 1, 2]), samples(3))
    assert len(first) == 0 and budget.used == samples(3).nbytes
    first.append(samples(4).to(DEVICE))
    assert torch.equal(first.batch([0, 1, 2, 3]), samples(4))
    first.close(), second.close()
    assert list(tmp_path.iterdir()) == []


# -- a run ------------------------------------------------------------------------------------------------------------


def pruned(model: Path, home: Path, tokens: Tensor, recipe: Recipe, device: str, **spec: Any) -> bytes:
    shards = make_shards(model, home, 1, LENGTH, recipe=recipe, device=device, **spec)
    prune(shards, tokens)
    files = sorted((home / "output").glob("*.safetensors"))
    assert files
    return b"".join(file.read_bytes() for file in files)


def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Event, "query", lambda self: True)


def without_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stream, "wait_event", lambda self, event: None)
    monkeypatch.setattr(pretended_streams, "check_order", lambda *_: None)
    monkeypatch.setattr("pretended_device.check_order", lambda *_: None)


def with_one_slab_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Page-locked memory that is asked for lies where the first does."""
    empty, first = torch.empty, torch.empty(1 << 16, dtype=torch.uint8, pin_memory=True)

    def made(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return first[: size[0]] if pin_memory else empty(*size, **options)

    monkeypatch.setattr(torch, "empty", made)


@pytest.mark.parametrize("fault", [None, without_waiting, without_order, with_one_slab_for_all])
def test_a_fit_reads_what_was_computed(
    tiny_checkpoint: Callable[..., Path],
    tiny_tokens: Callable[..., Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_slabs: None,
    fault: Callable[[pytest.MonkeyPatch], None] | None,
) -> None:
    """Block by block, its units' inputs and outputs spooled, part of them to disk; and that a wait left out shows."""
    recipe, tokens = Recipe(criterion="sparsegpt", solve=False, reconstruct="none"), tiny_tokens(SAMPLES, LENGTH)
    spec = {"resident": "one", "spool_memory": 1 << 14}
    expected = pruned(tiny_checkpoint(), tmp_path / "here", tokens, recipe, "cpu", **spec)
    with PretendedDevice(), monkeypatch.context() as patched:  # undone before the device's own patches are
        if fault is None:
            assert pruned(tiny_checkpoint(), tmp_path / "there", tokens, recipe, NAME, **spec) == expected
            return
        fault(patched)
        try:
            found = pruned(tiny_checkpoint(), tmp_path / "there", tokens, recipe, NAME, **spec)
        except Refusal as refusal:
            assert "not finite" in str(refusal) or "NaN" in str(refusal)
            return
    assert found != expected


pytestmark = pytest.mark.slow
RECIPES = {
    "masks": Recipe(reconstruct="none"),
    "fit": Recipe(learning_rate=GENTLE),
    "corrected": Recipe(solve=True, criterion="magnitude", targets="corrected", inputs="pruned", learning_rate=GENTLE),
    "pruned inputs": Recipe(inputs="pruned", criterion="magnitude", learning_rate=GENTLE),
    "sweep": Recipe(sweeps=1, learning_rate=GENTLE),
}


@pytest.mark.parametrize("name", RECIPES)
def test_no_copy_of_a_run_is_pageable(
    device: PretendedDevice, tiny_checkpoint: Callable[..., Path], tiny_tokens: Callable[..., Tensor], tmp_path: Path,
    name: str,
) -> None:  # fmt: skip
    """Not of a window, a microbatch, a minibatch, nor of a weight; and no activation is waited for where it is kept."""
    pruned(tiny_checkpoint(), tmp_path, tiny_tokens(SAMPLES, LENGTH), RECIPES[name], NAME)
    assert not [place for place in device.copies if "pageable" in place or "waited for" in place], device.copies
    assert sum(device.copies.values()) > 50
    assert not [place for place in device.waits if "spool.py:append" in place], device.waits


def test_a_fit_waits_for_its_held_out_samples_twice(
    device: PretendedDevice, tiny_checkpoint: Callable[..., Path], tiny_tokens: Callable[..., Tensor], tmp_path: Path
) -> None:
    """A unit's fit: its error before and after, and whether it is finite; its minibatches are sent one ahead."""
    recipe = Recipe(learning_rate=GENTLE)
    (shard,) = make_shards(tiny_checkpoint(), tmp_path, 1, LENGTH, recipe=recipe, device=NAME)
    prune([shard], tiny_tokens(SAMPLES, LENGTH))
    units, steps = 2 * 4, 4  # of eight samples, two a step
    fitting = {place: times for place, times in device.waits.items() if "reconstruct.py" in place}
    assert sum(times for place, times in fitting.items() if "weight_rms" not in place) <= 3 * units, fitting
    assert device.streams.ahead >= units * (2 * steps - 1)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_pass_through_a_block_waits_once_for_all_its_sums(
    device: PretendedDevice, tiny_tokens: Callable[..., Tensor], tmp_path: Path, family: str
) -> None:
    """However many weights, experts and samples a microbatch has; and once more to learn what each expert gets."""
    model = family_checkpoint(tmp_path / "families")(family, "float32")
    recipe = Recipe(reconstruct="none")
    (shard,) = make_shards(model, tmp_path, 1, LENGTH, blocks=LAYERS, recipe=recipe, device=NAME)
    stream([shard], tiny_tokens(SAMPLES, LENGTH), 0)
    with device.counted() as waits:
        for block in range(LAYERS):
            shard.gather(BlockTask(blocks=(block,)))
    sums = sum(times for place, times in waits.items() if "statistics.py" in place)
    experts = sum(times for place, times in waits.items() if "experts.py" in place)
    passes = 5 * LAYERS
    assert sums == passes, waits
    assert experts == (passes if family == "mixtral" else 0), waits


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_what_is_not_finite_is_refused_by_name_as_on_a_cpu(
    device: PretendedDevice, tiny_tokens: Callable[..., Tensor], tmp_path: Path, family: str
) -> None:
    model, said = family_checkpoint(tmp_path / "families")(family, "float32"), []
    for place in ("cpu", NAME):
        recipe = Recipe(reconstruct="none")
        (shard,) = make_shards(model, tmp_path / place, 1, LENGTH, blocks=LAYERS, recipe=recipe, device=place)
        parts = microbatches(tiny_tokens(SAMPLES, LENGTH))
        begin([shard], tiny_tokens(SAMPLES, LENGTH), keeps=0, onward=False)
        for number, part in enumerate(parts):
            hidden = shard.embed(part)
            if number == 1:
                hidden[1, 3, 5] = float("inf")
            shard.forward(number, hidden)
        with pytest.raises(Refusal) as refused:
            shard.gather(BlockTask(blocks=(0,)))
        said.append(str(refused.value))
    assert said[0] == said[1]
    assert "calibration, block 0, " in said[0] and "sample 3: NaN or infinity in its inputs" in said[0]


def test_a_checkpoints_weights_are_asked_once_whether_they_are_finite(device: PretendedDevice, tmp_path: Path) -> None:
    tensors = {f"w{n}": samples(n + 1) for n in range(5)}
    save_file(tensors, tmp_path / "model.safetensors")
    with device.counted() as waits:
        loaded = Checkpoint(tmp_path).load(tensors, dtype=torch.bfloat16, device=NAME)
    assert sum(waits.values()) == 1, waits
    assert all(same_bits(loaded[name].cpu(), tensors[name].bfloat16()) for name in tensors)
    tensors["w2"][0, 0, 0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(Refusal, match=r"model.safetensors: w2: 1 of 1152 weights are NaN or infinite as float32"):
        Checkpoint(tmp_path).load(tensors, device=NAME)
