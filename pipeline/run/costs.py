"""What the phases of a run took: seconds, joules of this machine, floating-point operations."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

from espalier.pipeline.record.run_record import Spent
from espalier.stages.metrics.energy import Energy, EnergyMeter, Joules
from espalier.stages.metrics.flops import Shapes, forward_flops


class CostMeter:
    """Adds up what is spent, phase by phase. A context manager: energy is counted from entering to leaving it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._energy: dict[str, Energy] = {}
        self._samples: dict[str, int] = {}
        self._started = time.time()
        self._meter = EnergyMeter()

    def __enter__(self) -> Self:
        self._meter.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._meter.__exit__(*exception)

    @contextmanager
    def phase(self, name: str, samples: int = 0) -> Iterator[None]:
        """Within it, time and energy go to this phase; so many samples pass through the whole model."""
        started, before = time.perf_counter(), self._meter.read()
        try:
            yield
        finally:
            spent = self._meter.read() - before
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            self._energy[name] = self._energy[name] + spent if name in self._energy else spent
            if samples:
                self._samples[name] = self._samples.get(name, 0) + samples

    def record(self, nodes: int, shapes: Shapes, length: int, others: Mapping[str, float]) -> Spent:
        """seconds, energy and flops by phase, as run.json holds them. `others`: operations counted elsewhere, added.

        Energy is empty, which is not measured, where the run was spread over more than this one of so many `nodes`.
        """
        flops = {phase: forward_flops(shapes, samples * length, length) for phase, samples in self._samples.items()}
        flops |= {phase: flops.get(phase, 0) + counted for phase, counted in others.items()}
        energy = {**self._energy, "total": self._meter.read()} if nodes == 1 else {}
        return {
            "seconds": {**self.seconds, "total": time.time() - self._started},
            "energy": {phase: Joules(cpu=joules.cpu, gpu=joules.gpu) for phase, joules in energy.items()},
            "flops": flops,
        }
