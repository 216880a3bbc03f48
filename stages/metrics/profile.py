"""Peak memory of a process and the times of its phases; and freed memory given back to the system."""

import ctypes
import resource
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from espalier.stages.devices import allocated_peak

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt
KEPT_AT_MOST = 32 << 20  # where glibc's own threshold stops to grow


def peak_bytes(device: str = "cpu") -> int:
    """The most memory this process ever held: resident set on a CPU, allocated device memory on a GPU."""
    if (allocated := allocated_peak(device)) is not None:
        return allocated
    try:
        # Not getrusage: its figure survives exec, so a child starts with its parent's.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def release_memory() -> None:
    """Give what was freed back to the system, where the C library can: glibc keeps up to a third of a large fit."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Within it, memory of 1 MiB or more goes back to the system when it is freed, where the C library can do that.

    glibc begins so, and keeps ever larger pieces for itself as such are freed (up to 32 MiB): after it as if it had.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    if option is None:
        yield
        return
    option(M_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        option(M_MMAP_THRESHOLD, KEPT_AT_MOST)
        option(M_TRIM_THRESHOLD, 2 * KEPT_AT_MOST)
        release_memory()


@dataclass(frozen=True, slots=True)
class Phase:
    """One stretch of work; times are seconds since the epoch."""

    phase: str
    block: int | None
    start: float
    end: float


class Timeline:
    """The phases of one shard, adjoining stretches of the same phase in one thread merged."""

    def __init__(self) -> None:
        self._phases: dict[int, list[Phase]] = defaultdict(list)  # by thread, so that none needs to wait for another

    @contextmanager
    def phase(self, name: str, block: int | None = None) -> Iterator[None]:
        start, phases = time.time(), self._phases[threading.get_ident()]
        try:
            yield
        finally:
            last = phases[-1] if phases else None
            if last and (last.phase, last.block) == (name, block) and start - last.end < 0.5:
                start = phases.pop().start
            phases.append(Phase(name, block, start, time.time()))

    def export(self) -> list[Phase]:
        """All phases so far, in the order in which they ended."""
        phases = [phase for one in list(self._phases.values()) for phase in list(one)]
        return sorted(phases, key=lambda phase: phase.end)
