"""Joules from counters that begin anew, that are missing, and that count the same twice."""

import ctypes
from pathlib import Path

import pytest

from espalier.stages.metrics import energy
from espalier.stages.metrics.energy import (
    Energy,
    EnergyMeter,
    NvmlDevice,
    RaplZone,
    described,
    nvml_counters,
    rapl_counters,
)

RANGE = 1_000_000  # microjoules


def zone(powercap: Path, place: str, name: str, microjoules: int) -> Path:
    directory = powercap / place
    directory.mkdir(parents=True)
    (directory / "name").write_text(f"{name}\n")
    (directory / "max_energy_range_uj").write_text(f"{RANGE}\n")
    (directory / "energy_uj").write_text(f"{microjoules}\n")
    return directory


class Gpu:
    """NVML as far as it is used: two GPUs that have counted 1 000 and 2 000 mJ."""

    def __init__(self, status: int = 0) -> None:
        self.millijoules, self.status = [1000, 2000], status

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetCount_v2(self, number: object) -> int:
        number._obj.value = 2  # type: ignore[attr-defined]
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: object) -> int:
        handle._obj.value = index + 1  # type: ignore[attr-defined]
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: ctypes.c_void_p, out: object) -> int:
        out._obj.value = self.millijoules[handle.value - 1]  # type: ignore[attr-defined, operator]
        return self.status


def test_a_counter_that_begins_anew_goes_on_counting(tmp_path: Path) -> None:
    directory = zone(tmp_path, "intel-rapl:0", "package-0", RANGE - 100_000)
    counter = RaplZone(directory)
    assert counter.read() == 0.0
    (directory / "energy_uj").write_text("400000")
    assert counter.read() == pytest.approx(0.5, abs=2e-6)
    (directory / "energy_uj").write_text("300000")  # all but once around
    assert counter.read() == pytest.approx(1.4, abs=3e-6)


def test_packages_and_memory_are_counted_once_and_their_parts_not_again(tmp_path: Path) -> None:
    zones = [zone(tmp_path, f"intel-rapl:{n}", f"package-{n}", 0) for n in (0, 1)]
    zones += [zone(tmp_path, "intel-rapl:0:0", "core", 0), zone(tmp_path, "intel-rapl:0:1", "dram", 0)]
    zones += [zone(tmp_path, "intel-rapl:2", "psys", 0), zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0)]
    counters = rapl_counters(tmp_path)
    with EnergyMeter(cpu=counters, gpu=[]) as meter:
        for directory in zones:
            (directory / "energy_uj").write_text("100000")
        assert meter.read() == Energy(cpu=pytest.approx(0.3), gpu=None)


def test_counters_that_only_root_may_read_are_none_at_all(tmp_path: Path) -> None:
    assert rapl_counters(tmp_path) == []
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    (zone(tmp_path, "intel-rapl:1", "package-1", 0) / "energy_uj").unlink()
    assert rapl_counters(tmp_path) == []


def test_gpus_count_from_when_the_meter_is_entered() -> None:
    library = Gpu()
    counters = nvml_counters(library)
    assert all(isinstance(counter, NvmlDevice) for counter in counters)
    with EnergyMeter(cpu=[], gpu=counters) as meter:
        library.millijoules = [1500, 4000]
        assert meter.read() == Energy(cpu=None, gpu=2.5)
    assert nvml_counters(Gpu(status=3)) == []  # a GPU before Volta


def test_the_thread_sees_every_round_of_a_counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "SAMPLE_SECONDS", 0.001)
    directory = zone(tmp_path, "intel-rapl:0", "package-0", 0)

    class Seen(RaplZone):
        reads = 0

        def read(self) -> float:
            Seen.reads += 1
            return super().read()

    counter = Seen(directory)
    with EnergyMeter(cpu=[counter], gpu=[]) as meter:
        while Seen.reads < 5:
            pass
        assert meter.read().cpu == 0.0
    at_the_end = Seen.reads
    assert not [thread for thread in __import__("threading").enumerate() if thread.name == "espalier-energy"]
    assert Seen.reads == at_the_end


def test_what_was_not_measured_is_said_and_not_taken_as_nothing() -> None:
    with EnergyMeter(cpu=[], gpu=[]) as meter:
        assert str(meter.read()) == "not measured"
    assert Energy(cpu=0.0).total == 0.0 and Energy().total is None
    assert str(Energy(cpu=1234.0, gpu=45_600.0)) == "CPU 1.23 kJ + GPU 45.6 kJ"
    assert described({"cpu": None, "gpu": 2.5e6}) == "GPU 2.5 MJ"
    assert described(None) == described({"cpu": None, "gpu": None}) == "not measured"
    assert Energy(cpu=3.0, gpu=None) - Energy(cpu=1.0, gpu=5.0) == Energy(cpu=2.0, gpu=None)
