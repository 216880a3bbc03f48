"""Costs of a tracking experiment by kind of work, from the run.json of its parts: seconds, joules, operations."""

from collections.abc import Iterable
from functools import reduce
from operator import add

from espalier.pipeline.record.run_record import Cost, PruneRecord, RetrainRecord
from espalier.stages.metrics.energy import Energy, Joules


def cost_of(run: PruneRecord | RetrainRecord, without: str | None = None) -> Cost:
    """Of a whole run; `without` names a part of it that is counted apart.

    A machine's counters do not tell that part's joules from the rest's: they stay in.
    """
    seconds, flops = dict(run["seconds"]), dict(run["flops"])
    total = seconds["total"] - (seconds.get(without, 0.0) if without else 0.0)
    return {
        "seconds": total,
        "flops": sum(value for phase, value in flops.items() if phase != without),
        "energy": run["energy"].get("total"),
    }


def cost_of_tracking(run: RetrainRecord) -> Cost:
    """Of the shadow in a training run."""
    return {"seconds": run["seconds"]["track"], "flops": run["flops"]["track"], "energy": None}


def summed(costs: Iterable[Cost]) -> Cost:
    """Together; joules only where each was measured."""
    costs = list(costs)
    energy = reduce(add, (Energy(**cost["energy"]) if cost["energy"] else Energy() for cost in costs))
    return {
        "seconds": sum(cost["seconds"] for cost in costs),
        "flops": sum(cost["flops"] for cost in costs),
        "energy": None if energy.total is None else Joules(cpu=energy.cpu, gpu=energy.gpu),
    }
