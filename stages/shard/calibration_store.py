"""What passes leave behind in a shard's blocks: a calibration of each, whole or under way, within one budget."""

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn

from espalier.stages.errors import OutOfStep
from espalier.stages.loading.skeleton import Skeleton
from espalier.stages.model.anatomy import trace
from espalier.stages.model.calls import LayerCalls, inside
from espalier.stages.precision import computing
from espalier.stages.shard.calibration import BlockCalibration
from espalier.stages.shard.spec import ShardSpec
from espalier.stages.storage.spool import SpoolBudget

TRACE_TOKENS = 4


class CalibrationStore:
    """The calibrations of a shard's blocks, filled by passes from `begin` to `end` through what `watching` sees."""

    def __init__(
        self, spec: ShardSpec, skeleton: Skeleton, calls: LayerCalls, directory: Path, budget: SpoolBudget
    ) -> None:
        self._spec, self._skeleton, self._calls = spec, skeleton, calls
        self._directory, self._budget = directory, budget
        self._calibrations: dict[int, BlockCalibration] = {}
        self._windows = {block: window for window in spec.block_windows for block in window}
        self._collect: frozenset[int] = frozenset()
        self._sweep = 0

    # -- passes ----------------------------------------------------------------------------------------------------

    def begin(self, collect: Collection[int], sweep: int) -> None:
        """A pass begins that gathers, in the blocks of `collect` that are the shard's, what they need for `sweep`."""
        self._sweep = sweep
        self._collect = frozenset(collect) & set(range(self._spec.first, self._spec.last))
        for index in self._collect & self._calibrations.keys():
            if sweep:
                self._calibrations[index].begin_drift()
            else:
                self.drop(index)

    @property
    def under_way(self) -> bool:
        """Whether the pass gathers anything here."""
        return bool(self._collect)

    def watching(self, index: int, block: nn.Module) -> AbstractContextManager[None]:
        """What gathers from the block's passes what the sweep under way needs of them, if it needs anything."""
        if index not in self._collect:
            return nullcontext()
        calibration = self.of(index, block)
        if not self._sweep:
            return calibration.watching(block)
        assert self._spec.recipe is not None
        return calibration.watching_drift(block, self._spec.recipe.predicts_inputs)

    def end(self) -> None:
        """The pass is over: what it gathered is whole. Raises OutOfStep if part of the samples is missing."""
        for index in self._collect:
            if not self._calibrations[index].keeps_alike:
                raise OutOfStep(f"shard {self._spec.index} kept part of the samples in sweep {self._sweep}")
            self._calibrations[index].complete = True
            self._calibrations[index].drifted_for = self._sweep

    # -- what is there ---------------------------------------------------------------------------------------------

    def of(self, index: int, block: nn.Module) -> BlockCalibration:
        """The block's calibration, an empty one if it has none yet."""
        if index not in self._calibrations:
            recipe = self._spec.recipe
            assert recipe is not None
            # Fitting calls the components for whole samples, so it wants the call of a whole sample.
            length = self._spec.length if recipe.reconstruct != "none" or recipe.gathers else TRACE_TOKENS
            length = self._skeleton.positions(length, self._calls.first)
            skeleton = self._skeleton
            nothing = torch.zeros(1, length, skeleton.columns(index), dtype=skeleton.dtype, device=self._spec.device)
            call = self._calls.of_one(index, length)
            with computing(block):
                anatomy = trace(block, lambda: call.run(block, nothing), skeleton.layout)
                anatomy.calls = {name: inside(inner, call) for name, inner in anatomy.calls.items()}
                self._calibrations[index] = BlockCalibration(
                    index, block, anatomy, call, recipe, self._windows[index], self._directory, self._budget
                )
        return self._calibrations[index]

    def whole(self, index: int, sweep: int = 0) -> BlockCalibration:
        """The block's calibration for `sweep`. Raises OutOfStep if it is not here, or not all of it."""
        calibration = self._calibrations.get(index)
        if calibration is None or not calibration.complete or calibration.drifted_for != sweep:
            raise OutOfStep(f"shard {self._spec.index} has no calibration of sweep {sweep} for block {index}")
        return calibration

    def sweeps(self) -> dict[int, int]:
        """The blocks whose calibration is whole, and the sweep whose inputs each of them holds (0: none)."""
        return {index: c.drifted_for for index, c in self._calibrations.items() if c.complete}

    def make_room(self, work: int) -> None:
        """Move activations to disk, the last blocks' first, so that they and `work` bytes beside them stay within the
        larger of the two's own bounds."""
        for index in sorted(self._calibrations, reverse=True):
            if self._budget.used + work <= max(work, self._budget.limit):
                return
            self._calibrations[index].spill()

    def drop(self, index: int) -> None:
        """Let go of the block's calibration."""
        self._calibrations.pop(index).close()
