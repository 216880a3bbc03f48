"""What the calibration stream leaves behind in one block: statistics per shared input, activations per unit."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stages.blocks import Anatomy, Call, first
from stages.errors import Refusal
from stages.spool import Spool, SpoolBudget
from stages.statistics import InputStatistics


class BlockCalibration:
    """Filled by the forward passes made inside `watching`, in stream order; read by the block's work.

    `statistics`: linear name -> the statistics of its input (one object for all linears that read the same tensor).
    `inputs`, `outputs`: component name -> its unit's inputs and dense outputs, one record a sample; only if `spool`.
    """

    def __init__(
        self, index: int, block: nn.Module, anatomy: Anatomy, directory: Path, budget: SpoolBudget, spool: bool
    ) -> None:
        self.index, self.anatomy = index, anatomy
        self.complete = False  # set when the pass that fills it has ended
        self.statistics: dict[str, InputStatistics] = {}
        for group in anatomy.shared_inputs:
            linear = block.get_submodule(group[0])
            assert isinstance(linear, nn.Linear)
            shared = InputStatistics(linear.in_features, device=linear.weight.device)
            self.statistics.update(dict.fromkeys(group, shared))
        self.inputs: dict[str, Spool] = {}
        self.outputs: dict[str, Spool] = {}
        for unit in anatomy.units if spool else []:
            stem = directory / f"block-{index:05d}-{unit.name}"
            self.inputs[unit.name] = Spool(stem.with_suffix(".inputs.arrow"), budget)
            self.outputs[unit.name] = Spool(stem.with_suffix(".outputs.arrow"), budget)

    @contextmanager
    def watching(self, block: nn.Module) -> Iterator[None]:
        """Within it, each forward pass of `block` adds its samples. The pass itself computes what it always does."""
        with ExitStack() as hooks:
            for group in self.anatomy.shared_inputs:
                linear = block.get_submodule(group[0])
                hooks.callback(linear.register_forward_pre_hook(self._count(group[0])).remove)
            for unit in self.anatomy.units if self.inputs else []:
                entry, exit_ = block.get_submodule(unit.modules[0]), block.get_submodule(unit.modules[-1])
                spool_in, spool_out = self.inputs[unit.name], self.outputs[unit.name]
                hooks.callback(entry.register_forward_pre_hook(_spool_input(spool_in), with_kwargs=True).remove)
                hooks.callback(exit_.register_forward_hook(_spool_output(spool_out)).remove)
            yield

    def _count(self, linear: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            try:
                self.statistics[linear].update(args[0])
            except Refusal as refusal:
                raise Refusal(f"calibration, block {self.index}, {linear}: {refusal}") from None

        return hook

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


def _spool_input(spool: Spool) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        spool.append(Call.hidden_of(args, kwargs))

    return hook


def _spool_output(spool: Spool) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        spool.append(first(output))

    return hook
