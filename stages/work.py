"""The work on one block: score, mask, fit each unit, count. What goes in is dense, what comes out is pruned."""

import hashlib
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stages.blocks import Unit, Weight
from stages.calibrate import BlockCalibration
from stages.criteria import score, score_rows
from stages.masks import Scope, count_zeros, keep_mask, masked
from stages.meter import Timeline
from stages.reconstruct import FitSettings, UnitModules, fit, rate_unit
from stages.skeleton import Skeleton

TRAINING_BYTES = 15  # a parameter of the unit being fitted
EXPERT_TOKENS = 32  # an expert that got fewer is pruned by magnitude: a channel's norm over n tokens is off by about
# 1/√(2n) of itself for normal activations (12 % at 32), more for those with outliers


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
        self.keep: dict[str, Tensor] = {}  # by parameter, in its own shape and orientation
        self.fallbacks: dict[str, int] = {}  # weight -> the tokens it got, where they were too few for the criterion
        self.rate_units = {unit.name: self._rate_unit(unit) for unit in calibration.anatomy.units}
        self.units: list[dict[str, Any]] = []
        self.seconds = {"mask": 0.0, "reconstruct": 0.0}
        self.flops = 0.0

    @property
    def training_bytes(self) -> int:
        """Memory that fitting the largest unit takes: weight, float32 master, two moments, mask."""
        units = self.calibration.anatomy.units
        return max(TRAINING_BYTES * sum(self.tensors[name].numel() for name in unit.parameters) for unit in units)

    def _rate_unit(self, unit: Unit) -> float:
        return rate_unit([self.tensors[name] for name in unit.parameters], self.skeleton.hidden_size)

    def prune(self) -> None:
        """Score and mask every prunable weight; pruned weights become +0."""
        started = time.perf_counter()
        with self.timeline.phase("score", self.index):
            for unit in self.calibration.anatomy.units:
                for name in unit.parameters:
                    keep = torch.empty_like(self.tensors[name], dtype=torch.bool)
                    for weight in (weight for weight in unit.weights if weight.parameter == name):
                        weight.of(keep).copy_(self._choose(weight, weight.of(self.tensors[name])))
                    self.keep[name] = keep
                    self.tensors[name] = masked(self.tensors[name], keep)
        self.seconds["mask"] = time.perf_counter() - started

    def _criterion(self, weight: Weight) -> str:
        statistics = self.calibration.statistics[weight.name]
        if weight.expert is None or statistics.tokens >= EXPERT_TOKENS or self.recipe.criterion == "magnitude":
            return self.recipe.criterion
        self.fallbacks[weight.name] = statistics.tokens
        return "magnitude"

    def _choose(self, weight: Weight, matrix: Tensor) -> Tensor:
        """Which weights survive, bool (O, I). Where rows do not depend on each other, a few at a time: the scores stay
        in the cache, and the weight never has a float32 copy."""
        recipe, criterion = self.recipe, self._criterion(weight)
        statistics = self.calibration.statistics[weight.name]
        if recipe.scope == "matrix" and recipe.pattern is None:
            return keep_mask(score(criterion, matrix, statistics), recipe.sparsity, scope="matrix")
        keep = torch.empty(matrix.shape, dtype=torch.bool, device=matrix.device)
        for rows, scores in score_rows(criterion, matrix, statistics):
            keep[rows] = keep_mask(scores, recipe.sparsity, recipe.pattern)
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
        for name in unit.parameters:
            del self.keep[name]  # and its masks
        self.flops += report.flops
        self.units.append({"name": unit.name, **asdict(report)})

    def report(self) -> dict[str, Any]:
        """Counted zeros, errors, seconds: one plain dict, ready for the journal and for MLflow."""
        layers = {}
        for weight in self.calibration.anatomy.weights:
            matrix = weight.of(self.tensors[weight.parameter])
            layers[weight.name] = {"zeros": count_zeros(matrix), "weights": matrix.numel()}
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
            "fallbacks": dict(self.fallbacks),
            "spool_disk": self.calibration.disk_bytes,
        }
