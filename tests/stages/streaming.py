"""A model cut into plain shards and run in this process, for the tests: no Ray, no driver."""

import itertools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from stages.recipe import Recipe, WorkOrder
from stages.shard import Shard, ShardSpec

BATCH = 2  # samples a microbatch
GENTLE = 0.04  # a learning rate at which units of 32 random channels get better; the default suits trained models


def cuts(blocks: int, shards: int) -> list[tuple[int, int]]:
    edges = [round(blocks * part / shards) for part in range(shards + 1)]
    return list(itertools.pairwise(edges))


def make_shards(
    model: Path, home: Path, shards: int, length: int, *, blocks: int = 4, recipe: Recipe | None = None, **spec: Any
) -> list[Shard]:
    """The model's blocks spread over `shards` open shards that write to home/output and spool in home/scratch."""
    (home / "output").mkdir(parents=True, exist_ok=True)
    made = []
    for index, (first, last) in enumerate(cuts(blocks, shards)):
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


def microbatches(tokens: Tensor) -> list[Tensor]:
    return list(tokens.split(BATCH))


def stream(shards: Sequence[Shard], tokens: Tensor, collect: Collection[int] = ()) -> list[Tensor]:
    """The last block's output for every microbatch."""
    parts = microbatches(tokens)
    flowing = [shards[0].embed(part) for part in parts]
    for shard in shards:
        shard.begin(len(parts), collect)
        if shard.spec.resident == "all":
            flowing = [shard.forward(number, hidden) for number, hidden in enumerate(flowing)]
        else:
            for number, hidden in enumerate(flowing):
                shard.receive(number, hidden)
            shard.advance()
            flowing = [shard.emit(number) for number in range(len(parts))]
    return flowing


def prune(shards: Sequence[Shard], tokens: Tensor, blocks: int = 4) -> list[dict[str, Any]]:
    """Calibrate, then work on every block: the reports in block order."""
    stream(shards, tokens, range(blocks))
    return [report for shard in shards for piece in shard.spec.pieces for report in shard.work(WorkOrder(blocks=piece))]


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
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
