"""A shadow of the weights: their weighted average over a whole training run, kept on the CPU. stages/README.md §8.

With snapshots p_0, p_1, ... of a weight and multipliers m_n, its shadow after n is q_n = Σ m_i p_i / Σ m_i, computed as
q ← q + (p - q) · m_n / S_n with S_n = Σ m_i. Its importance is |q| (Systematic Weight Evaluation, 2502.17071, Eq. 2).
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from espalier.stages.errors import Refusal
from espalier.stages.shadow.formats import CHUNK, Draws, format_of
from espalier.stages.shadow.slices import STRIP, ShadowSlice, Strip, parameter_of
from espalier.stages.shadow.spec import Dtype, Rounding, Schedule, ShadowSpec, share, window_shares
from espalier.stages.storage.hf_checkpoint import Checkpoint, write_tensors

SETTINGS = "settings"  # in a saved shadow, beside the tensors: JSON as bytes


class ShadowTracker:
    """The shadow of some named tensors, updated from them by `update`.

    A name `PARAMETER@START` is a slice of a flattened parameter, as a ZeRO rank holds it. Shadows of fp32 and bf16 come
    out bit for bit the same however parameters are cut into slices. Those of int8 do where cuts fall on multiples of
    128 elements; of a block that a cut goes through, each slice has its own scale, within the bound below.

    Without a window the memory is one value a weight: `dtype`. With a window of k it is k values, the snapshots
    themselves, and importance is their weighted mean computed anew: exact however long the run. (A running sum from
    which snapshots are subtracted would drift.) The weights are those of the schedule: m_n of linear goes on growing.

    Error of one weight's q. fp32: that of float32 sums. Stochastic bf16 and int8, whose steps are h (2⁻⁷ |q| at most,
    and 1/113 of a block's largest |q| when its scale was last set): unbiased, and at most h · √(D + (1 + G) / 4) root
    mean square, h the largest so far, D the largest |p - q| of an update in steps, G how often the scale grew, which
    takes a block's largest |q| an eighth further each time. About D/2 rather than D in long runs; the number of updates
    does not come into it. Compensated bf16: at most 2⁻¹⁶ |q| Σ_i S_i / S_n, a sum of half as many steps as there
    are updates or less. In a window: below h.

    On a CPU `update` works in place with torch's threads, and is done when it returns. Where the tensors are on an
    accelerator, or with `background`, it only clones them on their device; a thread brings them over, on a stream of
    its own through two pinned buffers, and updates behind the training's back. It waits only for a snapshot that is
    still under way.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        schedule: Schedule = "linear",
        decay: float = 0.99,
        signed: bool = True,
        window: int | None = None,
        dtype: Dtype = "fp32",
        rounding: Rounding = "stochastic",
        seed: int = 0,
        background: bool | None = None,
    ) -> None:
        self.spec = ShadowSpec(
            schedule=schedule, decay=decay, signed=signed, window=window, dtype=dtype, rounding=rounding
        )
        self.seed, self.updates = seed, 0
        self._tensors = dict(named_parameters)
        self._format = format_of(dtype, rounding)
        self._draws = Draws(seed, self._format.fractions)
        self._slices = [self._new_slice(name, tensor) for name, tensor in self._tensors.items()]
        self._keys = [self._draws.key(slice_.parameter) for slice_ in self._slices]
        self._strips = [
            Strip(number, low, high)
            for number, slice_ in enumerate(self._slices)
            for low, high in slice_.cuts(STRIP, 0, slice_.end)
        ]
        device = next((tensor.device for tensor in self._tensors.values()), torch.device("cpu"))
        self._device = device if device.type != "cpu" else None
        behind = background if background is not None else self._device is not None
        self._behind = ThreadPoolExecutor(1, "shadow") if behind else None
        self._pending: Future[None] | None = None

    @classmethod
    def of(cls, spec: ShadowSpec, named_parameters: Iterable[tuple[str, Tensor]], seed: int = 0) -> "ShadowTracker":
        """A tracker as `spec` says; its `every` is for whoever calls `update`."""
        settings = {name: value for name, value in asdict(spec).items() if name != "every"}
        return cls(named_parameters, **settings, seed=seed)

    def _new_slice(self, name: str, tensor: Tensor) -> ShadowSlice:
        slice_ = ShadowSlice(name, tensor.shape, {})
        slice_.kept = self._format.empty(self.spec.window or 1, slice_.end)
        return slice_

    @property
    def nbytes(self) -> int:
        """Bytes of the shadow."""
        return sum(values.nbytes for slice_ in self._slices for values in slice_.kept.values())

    # -- updates ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self) -> None:
        """Take one snapshot. Raises Refusal if a weight, in this or in the snapshot before, is NaN or infinite."""
        self._settle()
        flat = [tensor.detach().reshape(-1) for tensor in self._tensors.values()]
        if self._behind is not None:
            flat = [tensor.clone() for tensor in flat]
        ready = None if self._device is None else torch.cuda.current_stream(self._device).record_event()
        number, self.updates = self.updates, self.updates + 1
        if self._behind is None:
            self._fold_all(flat, number, ready)
        else:
            self._pending = self._behind.submit(self._fold_all, flat, number, ready)

    def _settle(self) -> None:
        """Wait for the snapshot that is under way, if one is."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _fold_all(self, flat: list[Tensor], number: int, ready: Any) -> None:
        stretches: Iterator[Tensor] = (_stretch(flat, self._slices, strip) for strip in self._strips)
        if self._device is not None:
            stretches = _brought_over(stretches, self._device, ready)
        for strip, stretch in zip(self._strips, stretches, strict=True):
            self._fold(strip, number, stretch)

    def _fold(self, strip: Strip, number: int, given: Tensor) -> None:
        """One strip's part of snapshot `number`; `given` is that part of the tensor, on the CPU."""
        slice_, window = self._slices[strip.number], self.spec.window
        kept = slice_.slot(number % window if window else 0)
        weight = share(self.spec.schedule, self.spec.decay, number)
        first = slice_.inside(strip.low, strip.high).start
        values, rooms = given.float(), torch.empty(2, min(CHUNK, strip.high - strip.low))
        for low, high in slice_.cuts(CHUNK, strip.low, strip.high):
            change, room = rooms[:, : high - low]
            new = self._taken(values, change, slice_, low, high, first)
            draws = self._draws.of(self._keys[strip.number], number, low + slice_.base, high + slice_.base)
            if window:
                change.copy_(new)
                self._check_finite(change, slice_, number)
                self._format.clear(kept, low, high)
                self._format.write(kept, low, change, draws)
                continue
            old = self._format.read(kept, low, high, room)
            torch.sub(new, old, out=change)
            self._check_finite(change, slice_, number)
            old.add_(change.mul_(weight))  # three roundings an element, whatever its neighbours: cuts do not show
            self._format.write(kept, low, old, draws)

    def _check_finite(self, values: Tensor, slice_: ShadowSlice, number: int) -> None:
        if not values.sum().isfinite():
            raise Refusal(
                f"shadow: {slice_.name} holds NaN or infinity at snapshot {number}; "
                "the training has diverged: lower its learning rate, or clip its gradients"
            )

    def _taken(self, values: Tensor, room: Tensor, slice_: ShadowSlice, low: int, high: int, first: int) -> Tensor:
        """The snapshot from place `low` to `high`, zeros where the slice has none: part of `values`, which begin at
        the tensor's element `first`, or made in `room`."""
        inside = slice_.inside(low, high)
        part = values[inside.start - first : inside.stop - first]
        if self.spec.signed and len(part) == len(room):
            return part
        begin = inside.start + slice_.start - slice_.base - low
        end = begin + len(part)
        room[:begin] = room[end:] = 0
        room[begin:end] = part if self.spec.signed else part.abs()
        return room

    # -- results ---------------------------------------------------------------------------------------------------

    def importance(self) -> dict[str, Tensor]:
        """|q| of each tensor under its name: float32, on the CPU, in its shape; zeros before the first update."""
        self._settle()
        return {slice_.name: self._importance(slice_).view(slice_.shape) for slice_ in self._slices}

    def _importance(self, slice_: ShadowSlice) -> Tensor:
        window, total = self.spec.window, torch.empty(slice_.end)
        shares = [1.0]
        if window:
            shares = window_shares(self.spec.schedule, self.spec.decay, self.updates, window)
        for low, high in slice_.cuts(CHUNK, 0, slice_.end):
            mean, room = torch.zeros(high - low, dtype=torch.float64), torch.empty(high - low)
            for age, weight in enumerate(reversed(shares), 1):
                kept = slice_.slot((self.updates - age) % window if window else 0)
                mean += weight * self._format.read(kept, low, high, room).double()
            total[low:high] = mean.abs_()
        head = slice_.start - slice_.base
        return total[head : head + slice_.length]

    # -- what is saved ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All of it: settings and the count of updates as plain values, and "tensors" by name, which share memory with
        the tracker until its next update."""
        self._settle()
        settings = {name: value for name, value in asdict(self.spec).items() if name != "every"}
        return {
            "settings": settings | {"seed": self.seed},
            "updates": self.updates,
            "shapes": {slice_.name: list(slice_.shape) for slice_ in self._slices},
            "tensors": {
                f"{slice_.name}/{part}": values for slice_ in self._slices for part, values in slice_.kept.items()
            },
        }

    def load_state_dict(self, *states: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, of one rank or of several: slices may have been cut elsewhere.

        Raises Refusal for states of other settings or other counts of updates, or if a weight is in none of them.
        """
        self._settle()
        mine = self.state_dict()["settings"]
        for state in states:
            for name, value in state["settings"].items():
                if value != mine[name]:
                    raise Refusal(f"shadow: saved with {name} {value}, now {mine[name]}; give the saved run's options")
        if len(counts := {state["updates"] for state in states}) != 1:
            raise Refusal(f"shadow: ranks saved after {sorted(counts)} updates; all must be of one checkpoint")
        for slice_ in self._slices:
            slice_.kept = self._format.empty(self.spec.window or 1, slice_.end)
            taken = sum(
                self._adopt(slice_, saved) for state in states for saved in _saved(state, slice_.parameter, slice_.kept)
            )
            if taken != slice_.length:
                raise Refusal(
                    f"shadow: {slice_.name} has {slice_.length} weights, {taken} of them are in what was saved; "
                    "give the files of all ranks, of this model's shadow"
                )
        self.updates = counts.pop()

    def _adopt(self, slice_: ShadowSlice, saved: ShadowSlice) -> int:
        """Take over what `saved` has of the slice; how many values that is."""
        common = slice_.overlap(saved)
        if not common:
            return 0
        low, high = common.start, common.stop
        for slot in range(self.spec.window or 1):
            kept, source = slice_.slot(slot), saved.slot(slot)
            self._format.adopt(kept, low - slice_.base, source, low - saved.base, high - saved.base)
        return high - low

    def save(self, path: Path) -> None:
        """Write `state_dict` as one safetensors file. Raises Refusal when the disk is full."""
        state = self.state_dict()
        tensors = state.pop("tensors")
        settings = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
        write_tensors(path, tensors | {SETTINGS: settings})

    def load(self, *paths: Path) -> None:
        """Go on from files that `save` wrote, of one rank or of several. Raises Refusal as `load_state_dict` does."""
        states = []
        for path in paths:
            checkpoint = Checkpoint.of_file(path)
            state = json.loads(bytes(checkpoint.load([SETTINGS])[SETTINGS].numpy()))
            held = (ShadowSlice(name, shape, {}) for name, shape in state["shapes"].items())
            names = {saved.name for saved in held if any(slice_.overlap(saved) for slice_ in self._slices)}
            state["shapes"] = {name: shape for name, shape in state["shapes"].items() if name in names}
            wanted = [name for name in checkpoint.entries if name.rpartition("/")[0] in names]
            states.append(state | {"tensors": checkpoint.load(wanted)})
        self.load_state_dict(*states)


def _saved(state: Mapping[str, Any], parameter: str, parts: Iterable[str]) -> Iterator[ShadowSlice]:
    """The slices of one parameter in what was saved."""
    for name, shape in state["shapes"].items():
        if parameter_of(name)[0] == parameter:
            yield ShadowSlice(name, shape, {part: state["tensors"][f"{name}/{part}"] for part in parts})


def _stretch(flat: Sequence[Tensor], slices: Sequence[ShadowSlice], strip: Strip) -> Tensor:
    return flat[strip.number][slices[strip.number].inside(strip.low, strip.high)]


def _brought_over(stretches: Iterable[Tensor], device: torch.device, ready: Any) -> Iterator[Tensor]:
    """The stretches on the CPU, one after the other: while one is worked on, the next is on its way.

    They are copied on a stream of their own, once the event `ready` has passed, into two pinned buffers in turn.
    """
    stream = torch.cuda.Stream(device)
    buffers = [torch.empty(STRIP, dtype=torch.float32, pin_memory=True) for _ in range(2)]
    coming: tuple[Tensor, Any] | None = None
    with torch.cuda.device(device), torch.cuda.stream(stream):
        stream.wait_event(ready)
        for number, stretch in enumerate(stretches):
            landed = buffers[number % 2][: len(stretch)].copy_(stretch, non_blocking=True)
            following = landed, stream.record_event()
            if coming is not None:
                coming[1].synchronize()
                yield coming[0]
            coming = following
        if coming is not None:
            coming[1].synchronize()
            yield coming[0]
