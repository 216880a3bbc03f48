"""Joules that this machine used, where it counts them: RAPL for processors and their memory, NVML for NVIDIA GPUs.

A counter belongs to the machine and not to a process: whatever else runs on it is counted too.
"""

import ctypes
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypedDict

POWERCAP = Path("/sys/class/powercap")
SAMPLE_SECONDS = 20.0  # RAPL's smallest range, 65 kJ, is passed through in a few minutes under full load
NOT_MEASURED = "not measured"
UNITS = (("MJ", 1e6), ("kJ", 1e3), ("J", 1.0))


@dataclass(frozen=True, slots=True)
class Energy:
    """Joules by source; None for what this machine does not count."""

    cpu: float | None = None
    gpu: float | None = None

    @property
    def total(self) -> float | None:
        """The sum of what was counted, None if nothing was."""
        counted = [part for part in (self.cpu, self.gpu) if part is not None]
        return sum(counted) if counted else None

    def __add__(self, other: "Energy") -> "Energy":
        return Energy(_sum_of(self.cpu, other.cpu), _sum_of(self.gpu, other.gpu))

    def __sub__(self, earlier: "Energy") -> "Energy":
        return Energy(_difference(self.cpu, earlier.cpu), _difference(self.gpu, earlier.gpu))

    def __str__(self) -> str:
        """Such as `CPU 1.23 kJ + GPU 45.6 kJ`; `not measured` without a counter."""
        parts = [
            f"{name} {_joules(value)}" for name, value in (("CPU", self.cpu), ("GPU", self.gpu)) if value is not None
        ]
        return " + ".join(parts) or NOT_MEASURED


class Joules(TypedDict):
    """An Energy as a report holds it."""

    cpu: float | None
    gpu: float | None


def described(joules: Joules | None) -> str:
    """The same words for what a report holds."""
    return str(Energy(**joules)) if joules else NOT_MEASURED


def _sum_of(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


def _difference(now: float | None, before: float | None) -> float | None:
    return None if now is None or before is None else now - before


def _joules(value: float) -> str:
    name, unit = next((pair for pair in UNITS if value >= pair[1]), UNITS[-1])
    return f"{value / unit:.3g} {name}"


class Counter(Protocol):
    """Joules since some moment, never falling."""

    def read(self) -> float: ...


class RaplZone:
    """One zone of the powercap tree. Its counter of microjoules begins anew when it has reached its range."""

    def __init__(self, zone: Path) -> None:
        """Raises OSError or ValueError if the zone cannot be read, as is usual for all but root."""
        self._file = zone / "energy_uj"
        self._range = int((zone / "max_energy_range_uj").read_text())
        self._last = int(self._file.read_text())
        self._sum = 0

    def read(self) -> float:
        """Joules since the zone was opened; right as long as less than one range passes between two calls."""
        now = int(self._file.read_text())
        self._sum += now - self._last if now >= self._last else now + self._range + 1 - self._last
        self._last = now
        return self._sum / 1e6


def rapl_counters(powercap: Path = POWERCAP) -> list[RaplZone]:
    """A counter for each processor package and for memory counted apart from it; none unless all can be read.

    Other zones are passed over: `core` and `uncore` are parts of a package, `psys` and the `mmio` tree count it again.
    """
    try:
        names = {zone: (zone / "name").read_text().strip() for zone in sorted(powercap.glob("intel-rapl:*"))}
        return [RaplZone(zone) for zone, name in names.items() if name.startswith("package") or name == "dram"]
    except (OSError, ValueError):
        return []


class NvmlDevice:
    """One GPU's counter: millijoules since its driver was loaded (Volta and later)."""

    def __init__(self, library: Any, index: int) -> None:
        """Raises OSError if the GPU does not count its energy."""
        self._library, self._handle = library, ctypes.c_void_p()
        _checked(library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(self._handle)))
        self.read()

    def read(self) -> float:
        """Joules."""
        millijoules = ctypes.c_ulonglong()
        _checked(self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(millijoules)))
        return millijoules.value / 1e3


def nvml_counters(library: Any = None) -> list[NvmlDevice]:
    """A counter for each GPU of this machine; none without the driver's library, or if one does not count."""
    try:
        library = library or ctypes.CDLL("libnvidia-ml.so.1")
        _checked(library.nvmlInit_v2())
        number = ctypes.c_uint()
        _checked(library.nvmlDeviceGetCount_v2(ctypes.byref(number)))
        return [NvmlDevice(library, index) for index in range(number.value)]
    except (OSError, AttributeError):  # no library; one too old to count
        return []


def _checked(status: int) -> None:
    if status != 0:
        raise OSError(f"NVML status {status}")


class EnergyMeter:
    """Counts while it is entered: `with EnergyMeter() as meter: ...; meter.read()`.

    A thread reads the counters every SAMPLE_SECONDS, so that none begins anew unseen.
    """

    def __init__(self, cpu: list[Counter] | None = None, gpu: list[Counter] | None = None) -> None:
        """The counters: those given, or all that this machine has."""
        self._cpu = rapl_counters() if cpu is None else cpu
        self._gpu = nvml_counters() if gpu is None else gpu
        self._lock, self._left = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._sample, name="espalier-energy", daemon=True)
        self._start = Energy()

    def __enter__(self) -> Self:
        self._start = self._counted()
        if self._cpu:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        if self._cpu:
            self._thread.join()

    def read(self) -> Energy:
        """Joules since the meter was entered."""
        return self._counted() - self._start

    def _counted(self) -> Energy:
        with self._lock:
            return Energy(*(_sum(counters) for counters in (self._cpu, self._gpu)))

    def _sample(self) -> None:
        while not self._left.wait(SAMPLE_SECONDS):
            self._counted()


def _sum(counters: list[Any]) -> float | None:
    """Joules of all counters, None without any, or where one stopped answering."""
    try:
        return sum(counter.read() for counter in counters) if counters else None
    except (OSError, ValueError):
        return None
