"""What the calibration stream leaves behind in one block: statistics per shared input, activations per unit."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from stages.blocks import Anatomy, Weight
from stages.errors import Refusal
from stages.observe import observing
from stages.spool import Spool, SpoolBudget
from stages.statistics import InputStatistics


class BlockCalibration:
    """Filled by the forward passes made inside `watching`, in stream order; read by the block's work.

    `statistics`: weight name -> the statistics of its input (one object for all weights that read the same tensor).
    `inputs`, `outputs`: component name -> its unit's inputs and dense outputs, one record a sample; only if `spool`.
    """

    def __init__(
        self, index: int, block: nn.Module, anatomy: Anatomy, directory: Path, budget: SpoolBudget, spool: bool
    ) -> None:
        self.index, self.anatomy = index, anatomy
        self.complete = False  # set when the pass that fills it has ended
        self.statistics: dict[str, InputStatistics] = {}
        for group in anatomy.shared_inputs:
            weight = group[0].of(block.get_parameter(group[0].parameter))
            shared = InputStatistics(weight.shape[1], device=weight.device)
            self.statistics.update({member.name: shared for member in group})
        self.inputs: dict[str, Spool] = {}
        self.outputs: dict[str, Spool] = {}
        for unit in anatomy.units if spool else []:
            stem = directory / f"block-{index:05d}-{unit.name}"
            self.inputs[unit.name] = Spool(stem.with_suffix(".inputs.arrow"), budget)
            self.outputs[unit.name] = Spool(stem.with_suffix(".outputs.arrow"), budget)

    @contextmanager
    def watching(self, block: nn.Module) -> Iterator[None]:
        """Within it, each forward pass of `block` adds its samples. The pass itself computes what it always does."""
        if self.inputs:
            sides = (
                lambda unit, x: self.inputs[unit.name].append(x),
                lambda unit, y: self.outputs[unit.name].append(y),
            )
            with observing(block, self.anatomy, self._count, *sides):
                yield
        else:
            with observing(block, self.anatomy, self._count):
                yield

    def _count(self, group: tuple[Weight, ...], x: Tensor) -> None:
        name = group[0].name
        try:
            self.statistics[name].update(x)
        except Refusal as refusal:
            raise Refusal(f"calibration, block {self.index}, {name}: {refusal}") from None

    @property
    def disk_bytes(self) -> int:
        return sum(spool.disk_bytes for spool in [*self.inputs.values(), *self.outputs.values()])

    def spill(self) -> None:
        """Move the activations to disk."""
        for spool in [*self.inputs.values(), *self.outputs.values()]:
            spool.spill()

    def close(self) -> None:
        """Free the activations, in memory and on disk."""
        for spool in [*self.inputs.values(), *self.outputs.values()]:
            spool.close()
