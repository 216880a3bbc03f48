"""Which shard is given which blocks, what it will hold, and whether that fits: from a model's facts alone."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from espalier.pipeline.planning.model_info import ModelInfo
from espalier.stages.errors import Refusal
from espalier.stages.precision import COMPUTED, Compute, fitted_in
from espalier.stages.recipe import Recipe, block_windows
from espalier.stages.reconstruction.units import find_unit

PROCESS_BYTES = 600 << 20  # a shard's process with torch, transformers and Ray loaded and nothing else


def split_blocks(costs: tuple[int, ...], shards: int, blocks_per_unit: int = 1) -> list[tuple[int, int]]:
    """Consecutive (first, last) of each shard, `last` excluded, as even in cost as whole windows of blocks allow.

    Raises Refusal for more shards than there are blocks, or windows.
    """
    if blocks_per_unit > 1:
        together = block_windows(range(len(costs)), blocks_per_unit)
        if shards > len(together):
            raise Refusal(
                f"shards {shards}: {len(costs)} blocks make {len(together)} windows of {blocks_per_unit}, and a shard "
                f"needs one; at most {len(together)}"
            )
        ranges = split_blocks(tuple(sum(costs[block] for block in blocks) for blocks in together), shards)
        return [(together[first][0], together[last - 1][-1] + 1) for first, last in ranges]
    if shards > len(costs):
        raise Refusal(f"shards {shards}: the model has {len(costs)} blocks and a shard needs one; at most {len(costs)}")
    total, bounds, reached = sum(costs), [0], 0
    for index, cost in enumerate(costs):
        left = shards - len(bounds)  # boundaries still to be set
        if left and index > bounds[-1]:
            target = total * len(bounds) / shards
            must = len(costs) - index == left
            if must or (reached + cost / 2 >= target and len(costs) - index >= left):
                bounds.append(index)
        reached += cost
    return list(zip(bounds, [*bounds[1:], len(costs)], strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEstimate:
    """Bytes one shard is expected to need."""

    weights: int
    training: int
    spool_memory: int
    spool_disk: int
    peak: int


def estimate_shard(
    facts: ModelInfo,
    first: int,
    last: int,
    *,
    compute: Compute,
    resident: str,
    tokens: int,
    step_tokens: int,
    spool_memory: int,
    recipe: Recipe | None,
    gpu: bool,
) -> ShardEstimate:
    """What blocks `first` to `last` need: weights as they are stored, one block's in `compute` while it runs, one
    unit's training state, activations set aside.

    `peak` is the process's memory on a CPU, the device's on a GPU (where activations wait in the host's memory).
    """
    sizes, item = facts.block_bytes[first:last], COMPUTED[compute].itemsize
    ends = facts.ends_parameters * item if first == 0 or last == facts.blocks else 0
    together = recipe.blocks_per_unit if recipe else 1
    largest = together * max(facts.block_parameters[first:last])
    weights = ends + (sum(sizes) if resident == "all" else together * max(sizes))
    training, kept = 0, 0.0
    if recipe is not None:
        training = max(_fit_bytes(facts, first, last, step_tokens, recipe, compute), _hessian_bytes(facts, recipe))
        kept = _kept_streams(recipe)
    spooled = int(kept * tokens * _kept_width(facts, recipe) * item * (last - first))
    carried = 2 * tokens * facts.travels * item if resident == "one" or (recipe and recipe.sequential) else 0
    in_memory = min(spooled + carried, spool_memory)
    both = min(training + in_memory, max(training, spool_memory))  # activations make room for the fit
    copied = 0 if first or gpu else facts.copied_at_once
    # The pruned copies: of the blocks in work, and of those before them, which are being written (see `Commits`).
    copies = min(2, len(block_windows(range(first, last), together))) if recipe else 1
    copy = copies * together * max(sizes)
    if recipe is not None and "importance" in recipe.needs:
        copy += largest * 4  # what the shadow says of them
    if facts.dtype != str(COMPUTED[compute]).removeprefix("torch."):
        copy += largest * item  # as they are while they run
    return ShardEstimate(
        weights=weights,
        training=training,
        spool_memory=in_memory,
        spool_disk=spooled + carried - in_memory,
        peak=weights + copied + copy + (training if gpu else PROCESS_BYTES + both),
    )


def _fit_bytes(facts: ModelInfo, first: int, last: int, step_tokens: int, recipe: Recipe, compute: Compute) -> int:
    """Memory that fitting the largest unit takes: working copy, fp32 master, two moments; the largest gradient twice;
    a step's activations."""
    kind = find_unit(recipe.reconstruct)
    if kind is None:
        return 0
    unit = recipe.blocks_per_unit * kind.parameters(facts.unit_parameters[first:last], facts.largest_matrix)
    return (
        (12 + fitted_in(COMPUTED[compute]).itemsize) * unit
        + 6 * facts.largest_matrix
        + step_tokens * facts.hidden * 40 * recipe.blocks_per_unit
    )


def _hessian_bytes(facts: ModelInfo, recipe: Recipe) -> int:
    """Memory for the Hessians of one group's inputs (an attention's two, say), and for what is made of the largest."""
    if "hessian" not in recipe.needs:
        return 0
    widest = max(into for layers in facts.layers for _, _, into in layers)
    return 4 * (facts.hidden**2 + 4 * widest**2)


def _kept_streams(recipe: Recipe) -> float:
    """How often a block's tokens × hidden states are set aside: inputs and dense outputs of its units."""
    kind = find_unit(recipe.reconstruct)
    if kind is None:
        if recipe.corrected:
            return 1
        return 2 if recipe.gathers and not recipe.sequential else 0
    return (kind.streams + (kind.sweep_streams or 0 if recipe.sweeps else 0)) / recipe.blocks_per_unit


def _kept_width(facts: ModelInfo, recipe: Recipe | None) -> float:
    """How wide these streams are: of a whole block all that goes from block to block, of components the hidden states
    of each; two of them are what is usual."""
    kind = find_unit(recipe.reconstruct) if recipe is not None else None
    if kind is not None and kind.whole_blocks:
        return facts.travels
    return facts.hidden * max(2, *map(len, facts.unit_parameters)) / 2


def choose_resident(
    asked: Literal["all", "one", "auto"], estimates: dict[str, list[ShardEstimate]], memory_per_shard: int
) -> Literal["all", "one"]:
    """All blocks in memory if every shard then fits. Raises Refusal, with the figures, if not even one block does."""
    order: list[Literal["all", "one"]] = ["all", "one"] if asked == "auto" else [asked]
    for resident in order:
        if max(estimate.peak for estimate in estimates[resident]) <= memory_per_shard:
            return resident
    need = max(estimate.peak for estimate in estimates[order[-1]])
    raise Refusal(
        f"resident {asked}: a shard would need {need / 1e9:.1f} GB and has {memory_per_shard / 1e9:.1f} GB; "
        "use fewer shards a node, a smaller --spool-memory, --resident one or --reconstruct none"
    )


def as_dicts(estimates: list[ShardEstimate]) -> list[dict[str, int]]:
    return [asdict(estimate) for estimate in estimates]


def free_bytes(path: Path) -> int:
    """Free bytes where `path` lies or will lie."""
    import shutil

    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
