"""The work on one block: score, mask, fit each unit, count. What goes in is dense, what comes out is pruned."""

import hashlib
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stages.blocks import Unit
from stages.calibrate import BlockCalibration
from stages.criteria import ROW_WISE, score
from stages.masks import Scope, count_zeros, keep_mask, masked
from stages.meter import Timeline
from stages.reconstruct import FitSettings, UnitModules, fit, rate_unit
from stages.skeleton import Skeleton
from stages.statistics import InputStatistics

TRAINING_BYTES = 15  # a parameter of the unit being fitted
SCORED_AT_A_TIME = 1 << 17  # weights, where rows are scored independently


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How blocks are pruned. Exactly one of `sparsity` and `pattern` is set."""

    criterion: str = "wanda"
    sparsity: float | None = 0.5
    pattern: tuple[int, int] | None = None
    scope: Scope = "row"
    reconstruct: Literal["component", "none"] = "component"
    epochs: int = 1
    batch: int = 2
    learning_rate: float = 0.4
    seed: int = 0


def derived_seed(*parts: object) -> int:
    """A seed of its own for each (run seed, block, component, sweep): the same wherever and whenever it is used."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class BlockWork:
    """One block on its way from dense to pruned. `tensors` holds the result so far, by name inside the block."""

    def __init__(
        self,
        recipe: Recipe,
        index: int,
        dense: nn.Module,
        calibration: BlockCalibration,
        skeleton: Skeleton,
        timeline: Timeline,
    ) -> None:
        self.recipe, self.index, self.skeleton = recipe, index, skeleton
        self.calibration, self.timeline = calibration, timeline
        self.tensors: dict[str, Tensor] = dict(dense.state_dict())
        self.keep: dict[str, Tensor] = {}  # by weight name inside the block
        self.rate_units = {unit.name: self._rate_unit(unit) for unit in calibration.anatomy.units}
        self.units: list[dict[str, Any]] = []
        self.seconds = {"mask": 0.0, "reconstruct": 0.0}
        self.flops = 0.0

    @property
    def training_bytes(self) -> int:
        """Memory that fitting the largest unit takes: weight, float32 master, two moments, mask."""
        units = self.calibration.anatomy.units
        return max(TRAINING_BYTES * sum(self.tensors[f"{n}.weight"].numel() for n in unit.linears) for unit in units)

    def _rate_unit(self, unit: Unit) -> float:
        return rate_unit([self.tensors[f"{linear}.weight"] for linear in unit.linears], self.skeleton.hidden_size)

    def prune(self) -> None:
        """Score and mask every prunable weight; pruned weights become +0."""
        started = time.perf_counter()
        with self.timeline.phase("score", self.index):
            for linear in self.calibration.anatomy.linears:
                name = f"{linear}.weight"
                self.keep[name] = self._choose(self.tensors[name], self.calibration.statistics[linear])
                self.tensors[name] = masked(self.tensors[name], self.keep[name])
        self.seconds["mask"] = time.perf_counter() - started

    def _choose(self, weight: Tensor, statistics: InputStatistics) -> Tensor:
        """Which weights survive, bool (O, I). Where rows do not depend on each other, a few at a time: the scores stay
        in the cache, and the weight never has a float32 copy."""
        recipe = self.recipe
        rows = len(weight)
        if recipe.criterion in ROW_WISE and recipe.scope == "row" and weight.device.type == "cpu":
            rows = max(1, SCORED_AT_A_TIME // weight.shape[-1])
        keep = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
        for start in range(0, len(weight), rows):
            scores = score(recipe.criterion, weight[start : start + rows], statistics)
            keep[start : start + rows] = keep_mask(scores, recipe.sparsity, recipe.pattern, recipe.scope)
        return keep

    def reconstruct(self) -> None:
        """Fit every unit to its dense outputs, each on its own: with dense inputs the order does not matter."""
        pruned = self.skeleton.assembled(self.index, self.tensors)
        for unit in self.calibration.anatomy.units:
            started = time.perf_counter()
            with self.timeline.phase("reconstruct", self.index):
                self._fit(unit, pruned)
            self.units[-1]["seconds"] = time.perf_counter() - started
            self.seconds["reconstruct"] += self.units[-1]["seconds"]

    def _fit(self, unit: Unit, pruned: nn.Module) -> None:
        recipe, calibration = self.recipe, self.calibration
        parameters, report = fit(
            UnitModules(pruned, unit),
            self.keep,
            calibration.anatomy.calls[unit.name],
            calibration.inputs[unit.name],
            calibration.outputs[unit.name],
            FitSettings(
                epochs=recipe.epochs,
                batch=recipe.batch,
                learning_rate=recipe.learning_rate,
                seed=derived_seed(recipe.seed, self.index, unit.name, 0),
            ),
            self.rate_units[unit.name],
        )
        self.tensors.update(parameters)
        pruned.load_state_dict(parameters, strict=False, assign=True)  # the unit's bare pruned weights can go,
        for linear in unit.linears:
            del self.keep[f"{linear}.weight"]  # and its masks
        self.flops += report.flops
        self.units.append({"name": unit.name, **asdict(report)})

    def report(self) -> dict[str, Any]:
        """Counted zeros, errors, seconds: one plain dict, ready for the journal and for MLflow."""
        layers = {}
        for linear in self.calibration.anatomy.linears:
            weight = self.tensors[f"{linear}.weight"]
            layers[linear] = {"zeros": count_zeros(weight), "weights": weight.numel()}
        weights = sum(layer["weights"] for layer in layers.values())
        seconds = self.seconds["reconstruct"]
        statistics = next(iter(self.calibration.statistics.values()))
        return {
            "block": self.index,
            "sparsity": sum(layer["zeros"] for layer in layers.values()) / weights,
            "tokens": statistics.tokens,
            "gflops": self.flops / seconds / 1e9 if seconds else None,
            "seconds": dict(self.seconds),
            "units": self.units,
            "layers": layers,
            "spool_disk": self.calibration.disk_bytes,
        }
