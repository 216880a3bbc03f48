"""Which shard is given which blocks, what it will hold, and whether that fits: from a model's facts alone."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from espalier.pipeline.planning.model_info import ModelInfo
from espalier.stages.errors import Refusal
from espalier.stages.precision import COMPUTED, Compute, dtype_of, fitted_in
from espalier.stages.recipe import Recipe, block_windows
from espalier.stages.reconstruction.units import find_unit
from espalier.stages.shard.memory import (
    Arithmetic,
    logits_bytes,
    page_locked_bytes,
    pass_bytes,
    summing_bytes,
    work_bytes,
)

PROCESS_BYTES = 600 << 20  # a shard's process with torch, transformers and Ray loaded and nothing else
CUDA_HOST_BYTES = 2 << 30  # of that process, once it has used a GPU: CUDA's libraries and their tables
CONTEXT_BYTES = 1 << 30  # of a GPU, beside tensors: CUDA's context and kernels, and the work space of cuBLAS


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
    """Bytes one shard is expected to need.

    `peak` is the process's memory on a CPU, the device's on a GPU, where `host` is what the process takes beside it.
    """

    weights: int
    training: int
    spool_memory: int
    spool_disk: int
    peak: int
    host: int


def estimate_shard(
    facts: ModelInfo,
    first: int,
    last: int,
    *,
    compute: Compute,
    resident: str,
    samples: int,
    length: int,
    microbatch: int,
    spool_memory: int,
    recipe: Recipe | None,
    gpu: bool,
) -> ShardEstimate:
    """What blocks `first` to `last` need: weights as they are stored, and the most that a pass, the logits or the work
    on a unit takes beside them; activations set aside.

    On a CPU one memory holds all of it, on a GPU activations wait in the host's.
    """
    item = COMPUTED[compute].itemsize
    arithmetic = _arithmetic(facts, compute, length, gpu)
    together = recipe.blocks_per_unit if recipe else 1
    window, windows = together * max(facts.block_bytes[first:last]), block_windows(range(first, last), together)
    ahead = min(2, len(windows))  # with the window that is read meanwhile
    blocks = sum(facts.block_bytes[first:last]) if resident == "all" else ahead * window
    sources = 2 if recipe and recipe.sweeps else 1  # a sweep's passes go through the dense blocks and the pruned ones
    weights = _ends(facts, first, last) * item + sources * blocks
    streaming = _streaming(facts, first, last, microbatch, recipe, arithmetic)
    if recipe and len(windows) > 1:
        streaming += window  # the one before, which is being written
    training, working = 0, 0
    if recipe is not None:
        shapes = {facts.components[blocks[0] : blocks[-1] + 1] for blocks in windows}
        training = max(work_bytes(recipe, each, arithmetic) for each in shapes)
        working = training + _copies(facts, first, last, resident, recipe, arithmetic)
    spooled, carried = _set_aside(facts, first, last, resident, samples * length, recipe, item)
    in_memory = min(spooled + carried, spool_memory)
    copied = 0 if first else facts.copied_at_once
    if gpu:
        peak = weights + max(streaming, working)
        batch = max(microbatch, recipe.batch if recipe else 1)
        host = _host(facts, window, batch, arithmetic) + in_memory + copied
    else:
        room = max(0, spool_memory - training)  # activations make room for the work
        peak = PROCESS_BYTES + weights + copied + max(streaming + in_memory, working + min(in_memory, room))
        host = 0
    return ShardEstimate(
        weights=weights,
        training=training,
        spool_memory=in_memory,
        spool_disk=spooled + carried - in_memory,
        peak=peak,
        host=host,
    )


def _arithmetic(facts: ModelInfo, compute: Compute, length: int, gpu: bool) -> Arithmetic:
    dtype = COMPUTED[compute]
    return Arithmetic(
        stored=dtype_of(facts.dtype).itemsize,
        item=dtype.itemsize,
        fitted=fitted_in(dtype).itemsize,
        length=length,
        accelerator=gpu,
    )


def _ends(facts: ModelInfo, first: int, last: int) -> int:
    """Parameters outside the blocks that the shard loads: those between the first and the last have none."""
    if first == 0 and last == facts.blocks:
        return facts.only_parameters
    return facts.first_parameters if first == 0 else facts.last_parameters if last == facts.blocks else 0


def _streaming(
    facts: ModelInfo, first: int, last: int, microbatch: int, recipe: Recipe | None, arithmetic: Arithmetic
) -> int:
    """A microbatch on its way through a block, as that computes, and the sums over what is read; or its logits."""
    components = [component for block in facts.components[first:last] for component in block]
    cast = max(facts.block_parameters[first:last]) * arithmetic.item if arithmetic.stored != arithmetic.item else 0
    passing = pass_bytes(components, facts.hidden, microbatch * arithmetic.length, arithmetic)
    if recipe is not None:
        passing += summing_bytes(max(max(component.inputs) for component in components), arithmetic, hessian=False)
        more = recipe.most_streams - 1  # as it came, in parts and as it goes on
        passing += 3 * more * microbatch * arithmetic.length * facts.travels * arithmetic.item
    return max(cast + passing, logits_bytes(facts.vocabulary) if last == facts.blocks else 0)


def _copies(facts: ModelInfo, first: int, last: int, resident: str, recipe: Recipe, arithmetic: Arithmetic) -> int:
    """The pruned copies: of the blocks in work, and of those before them, which are being written (see `Commits`). With
    one window in memory at a time the first take the place of the dense blocks, tensor by tensor."""
    together = recipe.blocks_per_unit
    windows = min(2, len(block_windows(range(first, last), together))) - (resident == "one")
    copies = windows * together * max(facts.block_bytes[first:last])
    if "importance" in recipe.needs:
        copies += together * max(facts.block_parameters[first:last]) * 4  # what the shadow says of them
    return copies


def _set_aside(
    facts: ModelInfo, first: int, last: int, resident: str, tokens: int, recipe: Recipe | None, item: int
) -> tuple[int, int]:
    """Activations that the work on one window of blocks needs, and those carried from block to block."""
    if recipe is None:
        return 0, 2 * tokens * facts.travels * item if resident == "one" else 0
    kept = _kept_streams(recipe) * _kept_width(facts, recipe)
    carried = 2 * recipe.most_streams * facts.travels
    if recipe.corrected:
        carried += _going_on(recipe) * max(facts.travels, *(c.attention for block in facts.components for c in block))
    if resident == "one":  # a pass has what is kept, what came out of a block and what comes out of the next
        carried = max(carried, 3 * recipe.most_streams * facts.travels - int(kept))
    return int(kept * tokens * item), carried * tokens * item


def _host(facts: ModelInfo, window: int, batch: int, arithmetic: Arithmetic) -> int:
    """The host's memory for a GPU's shard: its process, what CUDA maps into it, page-locked slabs, and a window of
    blocks on its way to disk."""
    return (
        PROCESS_BYTES
        + CUDA_HOST_BYTES
        + page_locked_bytes(batch * arithmetic.length, facts.hidden, arithmetic)
        + window
    )


def _kept_streams(recipe: Recipe) -> float:
    """How often a window's tokens × hidden states are set aside: inputs and dense outputs of its units."""
    kind = find_unit(recipe.reconstruct)
    if kind is None:
        if recipe.corrected:
            return 1
        return 2 if recipe.gathers and not recipe.sequential else 0
    return kind.streams + (kind.sweep_streams or 0 if recipe.sweeps else 0)


def _going_on(recipe: Recipe) -> int:
    """How often the activations of all tokens are kept between the passes that find the masks of one unit with
    corrected targets, dense and pruned: what attention's last matrix reads, and from block to block what reaches the
    next, beside what reached the one before."""
    kind = find_unit(recipe.pruned_together)
    return 2 * min(3, recipe.blocks_per_unit) if kind is not None and kind.whole_blocks else 0


def _kept_width(facts: ModelInfo, recipe: Recipe) -> float:
    """How wide these streams are: of a whole block all that goes from block to block, of components the hidden states
    of each; two of them are what is usual."""
    kind = find_unit(recipe.reconstruct)
    if kind is not None and kind.whole_blocks:
        return facts.travels
    return facts.hidden * max(2, *map(len, facts.components)) / 2


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


def check_host(estimates: list[ShardEstimate], memory_per_shard: int) -> None:
    """Raises Refusal, with the figures, if GPUs' shards need more of the host's memory than there is."""
    need = max(estimate.host for estimate in estimates)
    if need > memory_per_shard:
        raise Refusal(
            f"host memory: a shard on a GPU would need {need / 1e9:.1f} GB and has {memory_per_shard / 1e9:.1f} GB; "
            "use fewer shards a node or a smaller --spool-memory"
        )


def as_dicts(estimates: list[ShardEstimate]) -> list[dict[str, int]]:
    return [asdict(estimate) for estimate in estimates]


def free_bytes(path: Path) -> int:
    """Free bytes where `path` lies or will lie."""
    import shutil

    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
