"""Streams, events and page-locked memory of the pretended device: torch.cuda's, as far as copies need them.

Computing ends as soon as it is launched, a copy beside it as late as it may: once somebody has waited for an event
that was recorded behind it. Until then its target holds no numbers (NaN, or the largest integer), and it reads its
source only then. So who does not wait, or lets go of the source or fills it anew too early, gets wrong numbers. What
numbers cannot show is refused: a stream that reads what another may still be writing, or uses memory of another's that
would be given away while it does (Tensor.record_stream).
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Unordered(RuntimeError):
    """A stream used what another had launched, without waiting for it; or its memory, without recording that."""


class Stream:
    """Work in the order in which it was launched."""

    def __init__(self, device: Any = None) -> None:
        self._copies: list[Callable[[], object]] = []  # launched and not done
        self._done = 0  # copies done, since the beginning
        self.seen = 0  # the computing stream's launches that this one has waited for

    def __deepcopy__(self, memo: Any) -> "Stream":
        return self  # a tensor's copy was made on the same one

    @property
    def launched(self) -> int:
        return self._done + len(self._copies)

    def add(self, copy: Callable[[], object]) -> None:
        self._copies.append(copy)

    def run_until(self, position: int) -> None:
        while self._done < position:
            self._done += 1
            self._copies.pop(0)()

    def ran(self, position: int) -> bool:
        return self._done >= position

    def record_event(self, event: Any = None) -> "Event":
        return Event(self, self.launched)

    def wait_event(self, event: "Event") -> None:
        streams = current()
        if event.stream is streams.computing:
            self.seen = max(self.seen, event.launches)
        elif self is streams.computing and event.stream.launched > event.position:
            streams.ahead += 1
        event.stream.run_until(event.position)


class Event:
    """A place in a stream's work."""

    def __init__(self, stream: Stream, position: int) -> None:
        self.stream, self.position = stream, position
        self.launches = current().launches()

    def query(self) -> bool:
        """Whether all before it is done."""
        return self.stream.ran(self.position)

    def synchronize(self) -> None:
        """The host waits until all before it is done."""
        current().note_wait("event")
        self.stream.run_until(self.position)


class Streams:
    """The streams of one device. `ahead`: how often computing began to read a copy while another was on its way."""

    now: "Streams | None" = None

    def __init__(self, launches: Callable[[], int], note_wait: Callable[[str], None]) -> None:
        self.launches, self.note_wait = launches, note_wait
        self.computing = Stream()
        self._of_thread = threading.local()
        self.ahead = self.locked_bytes = 0
        self._locked: set[int] = set()  # where page-locked memory begins

    @property
    def current(self) -> Stream:
        return getattr(self._of_thread, "stream", self.computing)

    @current.setter
    def current(self, stream: Stream) -> None:
        self._of_thread.stream = stream

    def lock(self, memory: Tensor) -> Tensor:
        """Count the memory as page-locked while it is there."""
        place, size = memory.untyped_storage().data_ptr(), memory.nbytes
        self._locked.add(place)
        self.locked_bytes += size

        def unlock() -> None:
            self._locked.discard(place)
            self.locked_bytes -= size

        weakref.finalize(memory, unlock)
        return memory

    def is_locked(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._locked

    def copy_late(self, target: Tensor, source: Tensor, up: bool) -> None:
        """Launch target <- source on the current stream."""
        if self.current is not self.computing:
            _spoil(target)
            self.current.add(lambda: target.copy_(source))
        elif up:  # what computes later comes behind it
            target.copy_(source)
        else:
            source = source.clone()  # what computes later may write over it
            _spoil(target)
            self.current.add(lambda: target.copy_(source))


def current() -> Streams:
    assert Streams.now is not None, "streams are used within a PretendedDevice alone"
    return Streams.now


@contextmanager
def stream(of: Stream) -> Iterator[None]:
    """Within it, work is launched there."""
    streams = current()
    before, streams.current = streams.current, of
    try:
        yield
    finally:
        streams.current = before


def check_order(func: Any, made_on: Stream, launch: int, recorded: set[Stream]) -> None:
    """Raises Unordered unless the current stream may use a tensor that was made there, as that launch."""
    streams = current()
    if made_on is streams.current:
        return
    if streams.current not in recorded:
        raise Unordered(f"{func}: a tensor of another stream, and record_stream was not called")
    if made_on is streams.computing and launch > streams.current.seen:
        raise Unordered(f"{func}: the copy's stream has not waited for the computing of what it copies")


def _spoil(target: Tensor) -> None:
    if target.is_floating_point():
        target.fill_(float("nan"))
    else:
        target.fill_(1 if target.dtype == torch.bool else torch.iinfo(target.dtype).max)
