"""What a process spent: peak memory, and when each phase ran; and giving freed memory back."""

import ctypes
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.devices import allocated_peak


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


@dataclass(frozen=True, slots=True)
class Phase:
    """One stretch of work; times are seconds since the epoch."""

    phase: str
    block: int | None
    start: float
    end: float


class Timeline:
    """The phases of one shard, adjoining stretches of the same phase merged."""

    def __init__(self) -> None:
        self._phases: list[Phase] = []

    @contextmanager
    def phase(self, name: str, block: int | None = None) -> Iterator[None]:
        start = time.time()
        try:
            yield
        finally:
            last = self._phases[-1] if self._phases else None
            if last and (last.phase, last.block) == (name, block) and start - last.end < 0.5:
                start = self._phases.pop().start
            self._phases.append(Phase(name, block, start, time.time()))

    def export(self) -> list[dict[str, Any]]:
        """All phases so far, oldest first."""
        return [asdict(phase) for phase in self._phases]
