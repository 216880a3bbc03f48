"""Costs of a tracking experiment by kind of work, from the run.json of its parts: seconds, joules, operations."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import reduce
from operator import add
from typing import Any

from espalier.stages.metrics.energy import Energy

Cost = dict[str, Any]  # seconds, flops, energy ({"cpu": joules, "gpu": joules} or None: not measured)


def cost_of(run: Mapping[str, Any], without: str | None = None) -> Cost:
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


def cost_of_tracking(run: Mapping[str, Any]) -> Cost:
    """Of the shadow in a training run."""
    return {"seconds": run["seconds"]["track"], "flops": run["flops"]["track"], "energy": None}


def summed(costs: Iterable[Cost]) -> Cost:
    """Together; joules only where each was measured."""
    costs = list(costs)
    energy = reduce(add, (Energy(**(cost["energy"] or {})) for cost in costs))
    return {
        "seconds": sum(cost["seconds"] for cost in costs),
        "flops": sum(cost["flops"] for cost in costs),
        "energy": None if energy.total is None else asdict(energy),
    }
