"""What phases took, added up."""

import pytest

from espalier.pipeline.run.costs import CostMeter
from espalier.stages.metrics.flops import Shapes, forward_flops

SHAPES = Shapes(parameters=1000, layers=2, width=16)


class Counter:
    joules = 0.0

    def read(self) -> float:
        return self.joules


def test_a_phase_that_comes_again_adds_up_and_samples_become_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = Counter()
    monkeypatch.setattr("espalier.stages.metrics.energy.rapl_counters", lambda: [counter])
    monkeypatch.setattr("espalier.stages.metrics.energy.nvml_counters", list)
    with CostMeter() as spending:
        for joules in (5.0, 7.0):
            with spending.phase("stream", samples=3):
                counter.joules += joules
        counter.joules += 1.0
        record = spending.record(1, SHAPES, 8, {"work": 15.0})
    assert record["energy"] == {"stream": {"cpu": 12.0, "gpu": None}, "total": {"cpu": 13.0, "gpu": None}}
    assert record["flops"] == {"stream": forward_flops(SHAPES, 48, 8), "work": 15.0}
    assert 0 <= record["seconds"]["stream"] <= record["seconds"]["total"]


def test_a_run_on_several_nodes_claims_no_energy() -> None:
    with CostMeter() as spending, spending.phase("work"):
        pass
    assert spending.record(2, SHAPES, 8, {})["energy"] == {}
