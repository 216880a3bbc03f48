"""Copies between the host's memory and a device's that run beside the computing.

A copy from or to ordinary memory is slow and holds the host up until it has ended. Here what goes up, or comes down,
passes a few slabs of page-locked memory that are used again and again, on streams of their own: what computes waits
for a copy only where it reads it, and the host where it reads what came down.

On a CPU there is nothing to copy: what is given is handed on as it is. A device without streams is copied to and from
as torch does it.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from espalier.stages.devices import copies_apart, on_accelerator

SLABS = 3  # of page-locked memory, each way
SLAB = 32 << 20  # bytes of one, unless a single tensor that is to be stacked in it is larger
ALIGNED = 256  # bytes; where tensors begin in a slab

Room = Callable[[Sequence[int], torch.dtype], Tensor]  # gives memory for a tensor of that shape
Make = Callable[[Room | None], Tensor]  # a tensor in the host's memory, in that room if it is given and of use
Deliver = Callable[[Tensor], object]  # takes in what came down, and keeps no view of it


@dataclass(slots=True, eq=False)
class _Slab:
    memory: Tensor  # bytes
    used: int = 0
    last: Any = None  # event behind the last copy from it, or to it


@dataclass(slots=True)
class _Slabs:
    """Page-locked memory, slab after slab; `freed` sees that a slab's copies have ended before it is filled anew."""

    close: Callable[[], Any]  # records an event behind the copies so far
    freed: Callable[[_Slab], None]
    slabs: deque[_Slab] = field(default_factory=deque)

    def take(self, size: int) -> tuple[_Slab, Tensor]:
        """A slab with `size` bytes left, now taken, and those."""
        size = max(size, 1)
        if not self.slabs or self.slabs[-1].used + size > len(self.slabs[-1].memory):
            self._turn(size)
        slab = self.slabs[-1]
        start, slab.used = slab.used, slab.used + size + -size % ALIGNED
        return slab, slab.memory[start : start + size]

    def _turn(self, size: int) -> None:
        if self.slabs:
            self.slabs[-1].last = self.close()
        slab = self.slabs.popleft() if len(self.slabs) == SLABS else None
        if slab is not None:
            self.freed(slab)
        if slab is None or len(slab.memory) < size:
            del slab
            slab = _Slab(torch.empty(max(SLAB, size), dtype=torch.uint8, pin_memory=True))
        slab.used, slab.last = 0, None
        self.slabs.append(slab)


@dataclass(frozen=True, slots=True)
class _Landing:
    """A copy to the host that may be under way."""

    slab: _Slab
    room: Tensor
    event: Any
    deliver: Deliver


class Lane:
    """The way to one device and back. Not for several threads at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module: Any = torch.get_device_module(device)
        self._up, self._down = self._module.Stream(device), self._module.Stream(device)
        self._rising = _Slabs(lambda: self._up.record_event(), _await)
        self._falling = _Slabs(lambda: self._down.record_event(), self._empty)
        self._landings: deque[_Landing] = deque()

    # -- up --------------------------------------------------------------------------------------------------------

    def send(self, make: Make) -> Callable[[], Tensor]:
        """Begin to copy what is made to the device; what comes back waits for it (the computing does, not the host).

        Its memory is of the copying stream: for what is sent again and again, and goes when it was used.
        """
        taken: list[Tensor] = []

        def room(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            taken.append(self._room(shape, dtype))
            return taken[-1]

        value = make(room)
        roomed = bool(taken) and value.untyped_storage().data_ptr() == taken[-1].untyped_storage().data_ptr()
        with self._module.stream(self._up):
            there = torch.empty(value.shape, dtype=value.dtype, device=self.device)
            there.copy_(value, non_blocking=True) if roomed else self._copy_up(there, value)
        event = self._up.record_event()

        def here() -> Tensor:
            computing = self._module.current_stream(self.device)
            computing.wait_event(event)
            there.record_stream(computing)
            return there

        return here

    def place(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor on the device, in `dtype`, that may stay there: its memory is of the computing stream."""
        computing = self._module.current_stream(self.device)
        there = torch.empty(value.shape, dtype=dtype, device=self.device)
        self._up.wait_event(computing.record_event())  # what lay there before may still be read
        there.record_stream(self._up)
        with self._module.stream(self._up):
            self._copy_up(there, value)
        computing.wait_event(self._up.record_event())
        return there

    def _copy_up(self, there: Tensor, value: Tensor) -> None:
        """Through as many slabs as it takes, converted on the way in."""
        source, target = value.detach().reshape(-1), there.view(-1)
        for part in _stretches(len(source), there.dtype):
            room = self._room(source[part].shape, there.dtype)
            room.copy_(source[part])
            target[part].copy_(room, non_blocking=True)

    def _room(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        _, memory = self._rising.take(size)
        return memory[:size].view(dtype).view(shape)

    # -- down ------------------------------------------------------------------------------------------------------

    def fetch(self, value: Tensor, deliver: Deliver) -> None:
        """Begin to copy a tensor of the device to the host, as it is now; `deliver` is given it when it is there.

        That is when its slab is to be filled anew, or in `settle`; in the order of the calls.
        """
        value = value.detach().clone(memory_format=torch.contiguous_format)  # whatever is written over it meanwhile
        slab, memory = self._falling.take(value.nbytes)
        room = memory[: value.nbytes].view(value.dtype).view(value.shape)
        self._down.wait_event(self._module.current_stream(self.device).record_event())
        value.record_stream(self._down)
        with self._module.stream(self._down):
            room.copy_(value, non_blocking=True)
        self._landings.append(_Landing(slab, room, self._down.record_event(), deliver))

    def settle(self) -> None:
        """Deliver all that is on its way to the host. The host waits once."""
        if self._landings:
            _wait_for(self._landings[-1].event)
        while self._landings:
            landing = self._landings.popleft()
            landing.deliver(landing.room)

    def _empty(self, slab: _Slab) -> None:
        """Deliver what lies in the slab, the oldest one."""
        _await(slab)
        while self._landings and self._landings[0].slab is slab:
            landing = self._landings.popleft()
            landing.deliver(landing.room)


def _wait_for(event: Any) -> None:
    if not event.query():
        event.synchronize()


def _await(slab: _Slab) -> None:
    _wait_for(slab.last)


def _stretches(length: int, dtype: torch.dtype) -> Iterator[slice]:
    """Slices of so many elements that each fit a slab."""
    step = max(1, SLAB // dtype.itemsize)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


@functools.cache
def lane_of(device: torch.device) -> Lane:
    """The process's one way to the device, by type and number: for the thread that works with it."""
    return Lane(device)


def lane_to(device: torch.device | str) -> Lane | None:
    """Its lane; None where copies cannot run beside the computing, or there are none."""
    device = torch.device(device)
    if not copies_apart(device):
        return None
    if device.index is None:
        device = torch.device(device.type, torch.get_device_module(device).current_device())
    return lane_of(device)


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on the device; one that lies there is handed on as it is."""
    lane = None if tensor.device.type != "cpu" else lane_to(device)
    return tensor.to(device) if lane is None else lane.place(tensor, tensor.dtype)


def upload_made(make: Make, device: torch.device | str) -> Tensor:
    """What is made on the device; made in page-locked memory, where it is copied from there."""
    lane = lane_to(device)
    return _made(make, device) if lane is None else lane.send(make)()


def placing(device: torch.device | str) -> Callable[[Tensor, torch.dtype], Tensor]:
    """What gives a tensor's copy on the device, in a dtype, one after the other. For any thread."""
    if copies_apart(device):
        return Lane(torch.device(device)).place
    return lambda tensor, dtype: tensor.to(device=device, dtype=dtype, copy=True)


def prefetch(made: Iterable[Sequence[Make]], device: torch.device | str) -> Iterator[list[Callable[[], Tensor]]]:
    """For each few tensors what gives them on the device: while some are worked with, the next are on their way.

    Each is to be asked for once. Where no copy runs beside the computing, it is made when it is asked for.
    """
    lane = lane_to(device)
    if lane is None:
        for makes in made:
            yield [functools.partial(_made, make, device) for make in makes]
        return
    coming: list[Callable[[], Tensor]] | None = None
    for makes in made:
        following = [lane.send(make) for make in makes]
        if coming is not None:
            yield coming
        coming = following
    if coming is not None:
        yield coming


def _made(make: Make, device: torch.device | str) -> Tensor:
    return make(None).to(device)


def download(tensor: Tensor, deliver: Deliver) -> Lane | None:
    """Have `deliver` given the tensor in the host's memory: at once if it lies there, else when it has come.

    Back comes whose `settle` delivers it at the latest, if it has not been. What is delivered is the caller's own
    tensor, or a place that is used again."""
    lane = lane_to(tensor.device)
    if lane is None:
        deliver(tensor.cpu() if on_accelerator(tensor.device) else tensor)
    else:
        lane.fetch(tensor, deliver)
    return lane


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in the host's memory, contiguous; those that lie there so are handed on. For any thread.

    The host waits once for those of one device, unless they are larger than the slabs together.
    """
    lanes: dict[torch.device, Lane] = {}
    here = []
    for tensor in (tensor.detach() for tensor in tensors):
        if not copies_apart(tensor.device):
            here.append(tensor.contiguous().cpu())
            continue
        lane = lanes[tensor.device] = lanes.get(tensor.device) or Lane(tensor.device)
        here.append(torch.empty(tensor.shape, dtype=tensor.dtype))
        source, target = tensor.reshape(-1), here[-1].view(-1)
        for part in _stretches(len(source), tensor.dtype):
            lane.fetch(source[part], target[part].copy_)
    for lane in lanes.values():
        lane.settle()
    return here
