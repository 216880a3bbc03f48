"""A model cut into plain shards and run in this process, for the tests: no Ray, no driver."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from espalier.stages.data.image_table import ImageTable
from espalier.stages.recipe import BlockTask, Recipe
from espalier.stages.shard.hidden_states import Pass
from espalier.stages.shard.shard import Shard
from espalier.stages.shard.spec import ShardSpec

BATCH = 2  # samples a microbatch
GENTLE = 0.04  # a learning rate at which units of 32 random channels get better; the default suits trained models


def cuts(blocks: int, shards: int, window: int = 1) -> list[tuple[int, int]]:
    """(first, last) of each shard, cut between windows of blocks."""
    edges = [round(blocks / window * part / shards) * window for part in range(shards)]
    return list(itertools.pairwise([*edges, blocks]))


def make_shards(
    model: Path, home: Path, shards: int, length: int, *, blocks: int = 4, recipe: Recipe | None = None, **spec: Any
) -> list[Shard]:
    """The model's blocks spread over `shards` open shards that write to home/output and spool in home/scratch."""
    (home / "output").mkdir(parents=True, exist_ok=True)
    made = []
    for index, (first, last) in enumerate(cuts(blocks, shards, recipe.blocks_per_unit if recipe else 1)):
        shard = Shard(
            ShardSpec(
                index=index,
                first=first,
                last=last,
                embeds=index == 0,
                heads=index == shards - 1,
                model=str(model),
                output=str(home / "output"),
                scratch=str(home / "scratch"),
                length=length,
                recipe=recipe,
                **spec,
            )
        )
        shard.open()
        made.append(shard)
    return made


class Images:
    """A table of images as a pass takes it, so many of them in a microbatch."""

    def __init__(self, table: ImageTable, together: int = BATCH) -> None:
        rows = (table.rows(start, start + together) for start in range(0, len(table), together))
        self.parts = [_as_tensors(row) for row in rows]
        self.varying = _as_tensors(table.varying)


def _as_tensors(inputs: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(values.copy()) for name, values in inputs.items()}


Inputs = Tensor | Images  # tokens (samples, length), or images


def microbatches(inputs: Inputs) -> list[Any]:
    return list(inputs.split(BATCH)) if isinstance(inputs, Tensor) else inputs.parts


def begin(shards: Sequence[Shard], inputs: Inputs, **options: Any) -> None:
    varying = None if isinstance(inputs, Tensor) else inputs.varying
    for shard in shards:
        shard.begin(Pass(microbatches=len(microbatches(inputs)), **options), varying)


def stream(
    shards: Sequence[Shard], inputs: Inputs, keeps: int | None = None, streams: int = 1, shares: bool = False
) -> list[Tensor]:
    """The last block's output for every microbatch; each shard keeps what its work in sweep `keeps` starts from."""
    parts = microbatches(inputs)
    begin(shards, inputs, keeps=keeps, streams=streams, shares=shares)
    flowing = [shards[0].embed(part) for part in parts]  # after `begin`: a sweep may have more travel along
    for shard in shards:
        if shard.spec.resident == "all":
            flowing = [shard.forward(number, hidden) for number, hidden in enumerate(flowing)]
        else:
            for number, hidden in enumerate(flowing):
                shard.receive(number, hidden)
            shard.advance()
            flowing = [shard.emit(number) for number in range(len(parts))]
    return flowing


def prune(shards: Sequence[Shard], inputs: Inputs) -> list[dict[str, Any]]:
    """All that the shards' recipe says, sweep by sweep or block after block: the last reports in block order."""
    recipe = shards[0].spec.recipe
    assert recipe is not None
    if recipe.sequential:
        return _in_order(shards, inputs)
    for sweep in range(recipe.sweeps + 1):
        sources = recipe.sources(sweep)
        if sweep:
            for shard in shards:
                shard.open(sources)
        stream(shards, inputs, sweep, len(sources))
        orders = [
            (shard, BlockTask(blocks=window, sweep=sweep)) for shard in shards for window in shard.spec.block_windows
        ]
        for shard, order in orders:
            shard.work(order)
        reports = [shard.committed(order) for shard, order in orders]
    return [report for together in reports for report in together]


def worked(shard: Shard, order: BlockTask) -> list[dict[str, Any]]:
    """The reports of one piece of work, which is on disk."""
    shard.work(order)
    return shard.committed(order)


def _in_order(shards: Sequence[Shard], inputs: Inputs) -> list[dict[str, Any]]:
    """Each shard works on what the one before it emits."""
    reports: list[dict[str, Any]] = []
    recipe = shards[0].spec.recipe
    assert recipe is not None
    begin(shards, inputs, keeps=0, streams=recipe.most_streams, onward=False)
    flowing = [shards[0].embed(part) for part in microbatches(inputs)]
    for shard in shards:
        for number, hidden in enumerate(flowing):
            shard.receive(number, hidden)
        for window in shard.spec.block_windows:
            shard.work(BlockTask(blocks=window))
        reports += [
            report for window in shard.spec.block_windows for report in shard.committed(BlockTask(blocks=window))
        ]
        if not shard.spec.heads:
            flowing = [shard.emit(number) for number in range(len(flowing))]
    return reports


def whole_model(directory: Path, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """tokens -> logits of the model as transformers loads and runs it."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()

    @torch.no_grad()
    def logits(tokens: Tensor) -> Tensor:
        return model(input_ids=tokens.long(), use_cache=False).logits

    return logits


def same_bits(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and bits(left) == bits(right)


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
