"""A shard's work on a few blocks, its memory counted: blocks of any size on the meta device, or real ones on the host.

Values are random, or not there: the memory is the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from counted_memory import Counted, flash_attention
from torch import Tensor, nn
from transformers import PreTrainedConfig

from espalier.stages.loading.skeleton import Skeleton
from espalier.stages.metrics.profile import Timeline
from espalier.stages.model.anatomy import trace
from espalier.stages.model.calls import LayerCalls, inside
from espalier.stages.precision import computing, fitted_in
from espalier.stages.recipe import BlockTask, Recipe
from espalier.stages.reconstruction.fit import VALIDATION
from espalier.stages.reconstruction.shapes import Routing, UnitShape, component_shapes
from espalier.stages.shard.block_pruner import BlockPruner
from espalier.stages.shard.calibration import BlockCalibration
from espalier.stages.shard.memory import Arithmetic
from espalier.stages.storage.spool import SpoolBudget

DTYPE = torch.bfloat16  # of weights and of what is computed


class Samples:
    """A spool of so many samples that makes each anew when it is asked for; none is kept."""

    ragged = False

    def __init__(self, samples: int, length: int, channels: int, dtype: torch.dtype, device: str) -> None:
        self._samples, self._shape, self._made = samples, (length, channels), {"dtype": dtype, "device": device}

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(self._shape, **self._made)

    def batch(self, indices: list[int], room: Any = None) -> Tensor:
        return torch.randn(len(indices), *self._shape, **self._made)

    def of(self, channels: int | None) -> "Samples":
        """So many, of so many channels."""
        length, own = self._shape
        return Samples(self._samples, length, channels or own, **self._made)

    def append(self, samples: Tensor) -> None:
        pass

    def spill(self) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Peaks:
    """Bytes counted while some blocks were worked on, above the blocks themselves."""

    blocks: int  # the blocks
    passing: int  # most while a microbatch passed through one of them, above their casts
    masking: int  # most while masks were found
    fitting: dict[str, int]  # most while each unit was fitted
    what: str


@contextmanager
def as_on_a_gpu(device: str) -> Iterator[None]:
    """Attention without memory is computed as a GPU would."""
    if device != "meta":
        yield
        return
    with (
        patch.object(nn.functional, "scaled_dot_product_attention", flash_attention),
        patch.object(torch, "autocast", lambda *_, **__: nullcontext()),  # which does not know the meta device
    ):
        yield


def count_work(
    config: PreTrainedConfig,
    recipe: Recipe,
    *,
    device: str = "meta",
    length: int = 2048,
) -> Peaks:
    """Peaks of `recipe` on the first blocks of a model of `config`, a window of `length` passing at a time."""
    blocks = range(recipe.blocks_per_unit)
    skeleton = Skeleton(config, DTYPE, device, weights=DTYPE)
    with Counted() as counted, as_on_a_gpu(device), torch.no_grad():
        held = {index: _block(skeleton, index, device) for index in blocks}
        calls = LayerCalls(skeleton.calls)
        spools = Samples(VALIDATION + 1, length, skeleton.hidden_size, DTYPE, device)
        calibrations = {index: _calibration(skeleton, calls, held, index, recipe, spools, length) for index in blocks}
        passing = 0
        for index, block in held.items():
            with computing(block), calibrations[index].watching(0, block):
                alone = counted.restart()
                calls.following(index, 1, length).run(block, spools.batch([0]))
                passing = max(passing, counted.peak - alone)
        del block
        order, phases = BlockTask(blocks=tuple(blocks)), _Phases(counted)
        work = BlockPruner(recipe, order, held, calibrations, skeleton, phases, lambda name: spools)  # type: ignore[arg-type,return-value]
        phases.units = [unit.name for group in work.groups for unit in group.fits]
        del held
        alone = counted.restart()
        work.run()
    fitting = {name: peak - alone for name, peak in phases.fitting.items()}
    return Peaks(alone, passing, phases.masking - alone, fitting, phases.what)


class _Phases(Timeline):
    """The most while masks were found, and while each of `units` was fitted, in their order."""

    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self.units: list[str] = []
        self.masking, self.fitting, self.what = 0, dict[str, int](), ""
        self._counted, self._most = counted, 0

    @contextmanager
    def phase(self, name: str, block: int | None = None) -> Iterator[None]:
        counted = self._counted
        counted.restart()
        with torch.enable_grad() if name == "reconstruct" else nullcontext():
            yield
        if name == "mask":
            self.masking = max(self.masking, counted.peak)
        else:
            unit = self.units.pop(0)
            self.fitting[unit] = max(self.fitting.get(unit, 0), counted.peak)
        if counted.peak > self._most:
            self._most, self.what = counted.peak, counted.what


def _block(skeleton: Skeleton, index: int, device: str) -> nn.Module:
    made = {
        name: torch.randn(tensor.shape, dtype=DTYPE, device=device).mul_(0.02)
        for name, tensor in skeleton.layers[index].state_dict().items()
    }
    return skeleton.assembled(index, made)


def _calibration(
    skeleton: Skeleton,
    calls: LayerCalls,
    blocks: dict[int, nn.Module],
    index: int,
    recipe: Recipe,
    spools: Samples,
    length: int,
) -> BlockCalibration:
    block, call = blocks[index], calls.of_one(index, length)
    nothing = torch.zeros(1, length, skeleton.hidden_size, dtype=skeleton.dtype, device=skeleton.device)
    with computing(block):
        anatomy = trace(block, lambda: call.run(block, nothing), skeleton.layout)
        anatomy.calls = {name: inside(inner, call) for name, inner in anatomy.calls.items()}
        window = tuple(blocks)
        made = BlockCalibration(index, block, anatomy, call, recipe, window, Path("-"), SpoolBudget(0))
    widths = {w.name: w.of(block.get_parameter(w.parameter)).shape for w in anatomy.weights}
    made.inputs = {name: spools.of(widths[name][1] if name in widths else None) for name in made.inputs}  # type: ignore[misc]
    made.outputs = {name: spools.of(widths[name][0] if name in widths else None) for name in made.outputs}  # type: ignore[misc]
    return made


SHAPES = {  # of real models' blocks
    "8B": (4096, 14336, 32, 8),
    "70B": (8192, 28672, 64, 8),
    "405B": (16384, 53248, 128, 8),
}


def llama(hidden: int, inner: int, heads: int, key_heads: int, blocks: int = 2) -> PreTrainedConfig:
    """The config of a Llama of these sizes."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
    )


def mixtral(hidden: int, inner: int, heads: int, key_heads: int, experts: int, chosen: int) -> PreTrainedConfig:
    """The config of a mixture of experts of these sizes."""
    from transformers import MixtralConfig

    return MixtralConfig(
        vocab_size=128,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        num_local_experts=experts,
        num_experts_per_tok=chosen,
        max_position_embeddings=4096,
        architectures=["MixtralForCausalLM"],
    )


def shapes_in(
    config: PreTrainedConfig,
    recipe: Recipe,
    *,
    device: str = "meta",
    length: int = 2048,
) -> tuple[list[tuple[UnitShape, ...]], Arithmetic]:
    """What the estimates of `count_work` are made of."""
    skeleton, routing = Skeleton(config, DTYPE, "meta", weights=DTYPE), Routing.of(config)
    blocks = [component_shapes(skeleton.layers[i], skeleton.layout, routing) for i in range(recipe.blocks_per_unit)]
    return blocks, Arithmetic(
        stored=DTYPE.itemsize,
        item=DTYPE.itemsize,
        fitted=fitted_in(DTYPE).itemsize,
        length=length,
        accelerator=device != "cpu",
    )
