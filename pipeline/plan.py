"""From a model's config and the request: which shard owns which blocks, what it will hold, and every early refusal.

Nothing here reads a weight. Sizes come from the model built on the meta device, checked against the headers.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedConfig

from pipeline.config import PruneConfig
from stages.allocation import check_matches
from stages.blocks import layout_of, prunable
from stages.checkpoint import Checkpoint
from stages.criteria import find_criterion
from stages.errors import Refusal
from stages.masks import check_divisible
from stages.recipe import Recipe, Tower, pieces
from stages.shard import ENDS_FILE_BYTES, compute_dtype
from stages.skeleton import tied_names
from stages.vision import SKELETONS

PROCESS_BYTES = 600 << 20  # a shard's process with torch, transformers and Ray loaded and nothing else
MICROBATCH_TOKENS = 2048
LENGTH = 2048
SAMPLED_STRETCHES, STRETCH_BYTES = 64, 4096
SWAPS_FROM = 4  # tokens for each channel of the widest input


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """Sizes of one model, in bytes of the dtype it will be computed in."""

    path: str
    family: str
    tower: Tower
    dtype: str
    itemsize: int
    hidden: int
    vocabulary: int
    context: int
    parameters: int
    ends_bytes: int  # outside the blocks, held by the first or the last shard
    copied_bytes: int  # outside the blocks, only copied
    copied_at_once: int  # of these, what is in memory together
    block_bytes: tuple[int, ...]
    unit_parameters: tuple[tuple[int, ...], ...]  # parameters of each component, block by block
    largest_matrix: int
    linears: tuple[tuple[str, int, int], ...]  # (checkpoint name, out, in) of every prunable matrix
    stored: tuple[tuple[int, ...], ...]  # their shapes on disk
    layers: tuple[tuple[tuple[str, int, int], ...], ...]  # of each block's: (name as reports call it, out, in)

    @property
    def blocks(self) -> int:
        return len(self.block_bytes)

    @property
    def prunable(self) -> int:
        return sum(out * into for _, out, into in self.linears)

    @property
    def prunable_by_block(self) -> list[int]:
        return [sum(out * into for _, out, into in layers) for layers in self.layers]

    @property
    def total_bytes(self) -> int:
        return sum(self.block_bytes) + self.ends_bytes + self.copied_bytes

    @property
    def packed(self) -> bool:
        """Whether samples differ in length, and so pass through the blocks one at a time."""
        return layout_of(self.family, self.tower).packed

    def summary(self) -> dict[str, Any]:
        """For run.json."""
        return {
            "path": self.path,
            "family": self.family,
            "tower": self.tower,
            "images": layout_of(self.family).images,
            "blocks": self.blocks,
            "parameters": self.parameters,
            "prunable": self.prunable,
            "dtype": self.dtype,
        }


def model_facts(
    config: PreTrainedConfig,
    path: str,
    dtype: str = "auto",
    checkpoint: Checkpoint | None = None,
    tower: Tower = "language",
) -> ModelFacts:
    """Sizes from the config alone, names as the checkpoint has them (without it: as transformers would save them).

    Raises Refusal for a family that is not known here, and for the vision tower of one that has none.
    """
    torch_dtype = compute_dtype(config, dtype)
    skeleton = SKELETONS[tower](config, torch_dtype, checkpoint=checkpoint)
    item = torch_dtype.itemsize
    linears, stored, units, sizes, layers = [], [], [], [], []
    largest = 0
    for index, layer in enumerate(skeleton.layers):
        tensors = layer.state_dict()
        sizes.append(sum(tensor.numel() for tensor in tensors.values()) * item)
        components = prunable(layer, skeleton.layout)
        parts = {name: tuple(f"{p}." for p in skeleton.layout.parts(name)) for name in components}
        units.append(tuple(sum(t.numel() for n, t in tensors.items() if n.startswith(parts[c])) for c in components))
        matrices = [weight for members in components.values() for weight in members]
        layers.append(tuple((w.name, *w.of(layer.get_parameter(w.parameter)).shape) for w in matrices))
        weights = {weight.parameter: weight for weight in matrices}
        largest = max(largest, *(tensors[parameter].numel() for parameter in weights))
        for parameter, weight in weights.items():
            for name, matrix in skeleton.stored(index, {parameter: tensors[parameter]}).items():
                out, into = matrix.T.shape if weight.transposed else matrix.shape
                linears.append((name, out, into))
                stored.append(tuple(matrix.shape))
    tied = tied_names(skeleton.model)
    outside = {name: p.numel() for name, p in skeleton.model.named_parameters() if name not in tied}
    ends = sum(size for name, size in outside.items() if name in skeleton.ends)
    copied = [size for name, size in outside.items() if name not in skeleton.ends]
    return ModelFacts(
        path=path,
        family=config.model_type,
        tower=tower,
        dtype=str(torch_dtype).removeprefix("torch."),
        itemsize=item,
        hidden=skeleton.hidden_size,
        vocabulary=skeleton.vocabulary,
        context=skeleton.context,
        parameters=sum(sizes) // item + sum(outside.values()),
        ends_bytes=ends * item,
        copied_bytes=sum(copied) * item,
        copied_at_once=min(sum(copied) * item, max(ENDS_FILE_BYTES, max(copied, default=0) * item)),
        block_bytes=tuple(sizes),
        unit_parameters=tuple(units),
        largest_matrix=largest,
        linears=tuple(linears),
        layers=tuple(layers),
        stored=tuple(stored),
    )


def check_headers(facts: ModelFacts, checkpoint: Checkpoint) -> str:
    """A digest of the checkpoint's headers and of samples of its bytes, which tells another model of the same shapes.

    Raises Refusal if a prunable weight is missing or of another shape.
    """
    for (name, _, _), shape in zip(facts.linears, facts.stored, strict=True):
        entry = checkpoint.entry(name)
        if entry.shape != shape:
            raise Refusal(f"{entry.file}: {name} is {entry.shape}, config.json says {shape}; fetch both again")
    digest = hashlib.sha256(json.dumps([(e.name, e.shape, e.dtype) for e in checkpoint.entries.values()]).encode())
    for file in sorted({entry.file for entry in checkpoint.entries.values()}):
        digest.update(_sampled(checkpoint.directory / file))
    return digest.hexdigest()


def _sampled(path: Path) -> bytes:
    """Some stretches of a file, evenly spread, its end among them."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        stretches = []
        for position in range(1, SAMPLED_STRETCHES + 1):
            handle.seek(max(0, size * position // SAMPLED_STRETCHES - STRETCH_BYTES))
            stretches.append(handle.read(STRETCH_BYTES))
    return b"".join(stretches)


def settled(config: PruneConfig, facts: ModelFacts) -> PruneConfig:
    """The configuration with `refine: auto` decided for this model.

    Swaps take about O · I² operations a matrix, refitting O · I for each token: they are worth their time where the
    tokens are several times the widest input.
    """
    if config.refine != "auto":
        return config
    widest = max(into for layers in facts.layers for _, _, into in layers)
    tokens = config.samples * window_length(facts, config.length)
    swaps = config.reconstruct != "none" and tokens >= SWAPS_FROM * widest
    return config.model_copy(update={"refine": "swaps" if swaps else "none"})


def check_recipe_fits(facts: ModelFacts, recipe: Recipe) -> None:
    """Raises Refusal for a window larger than the model, an override that matches no layer, criterion options that a
    layer's criterion does not take, rows that groups of M do not fill, and a threshold for SparseGPT, naming the first
    such layer; for a shadow that is missing, or that no criterion reads."""
    if recipe.window > facts.blocks:
        raise Refusal(
            f"reconstruct window:{recipe.window}: the model has {facts.blocks} blocks; give at most that many"
        )
    names = [(block, layer, into) for block, layers in enumerate(facts.layers) for layer, _, into in layers]
    check_matches(recipe.overrides, [f"{block}.{layer}" for block, layer, _ in names])
    for block, layer, into in names:
        rule = recipe.rule(block, layer, recipe.sparsity)
        if rule.pattern is not None:
            check_divisible(into, rule.pattern, f"block {block}, {layer}")
        if rule.threshold is not None and find_criterion(rule.criterion).solve is not None:
            raise Refusal(
                f"block {block}, {layer}: threshold {rule.threshold:g} with criterion {rule.criterion}, which chooses "
                "so many of a few columns at a time as it goes; use --sparsity, or another criterion"
            )
    _check_shadow(recipe)


def _check_shadow(recipe: Recipe) -> None:
    if "importance" in recipe.needs and recipe.shadow is None:
        raise Refusal("criterion temporal: scores by a shadow; give --shadow DIR, the shadow/ that a training run left")
    if recipe.shadow is not None and "importance" not in recipe.needs:
        raise Refusal(f"shadow {recipe.shadow}: criterion {recipe.criterion} does not read it; temporal does")


def window_length(facts: ModelFacts, asked: int | Literal["auto"]) -> int:
    """Tokens of a window, or positions of an image (at most, where they may be of any size).

    Raises Refusal if it is longer than the model's context, and for images that are of one length.
    """
    if facts.tower == "vision" and not facts.packed:
        if asked not in ("auto", facts.context):
            raise Refusal(
                f"length {asked} with tower vision: a sample is an image, which takes {facts.context} positions; leave "
                "--length out"
            )
        return facts.context
    if asked == "auto":
        return min(LENGTH, facts.context)
    if asked > facts.context:
        raise Refusal(f"length {asked}: the model's context is {facts.context} tokens; give --length {facts.context}")
    return asked


def microbatch_size(asked: int | Literal["auto"], length: int, packed: bool = False) -> int:
    """Windows streamed together. Raises Refusal for more than one image where they may be `packed`."""
    if packed:
        if asked not in ("auto", 1):
            raise Refusal(
                f"microbatch {asked} with tower vision: this model's images may differ in size, so they pass one at a "
                "time; leave --microbatch out"
            )
        return 1
    return max(1, MICROBATCH_TOKENS // length) if asked == "auto" else asked


def split_blocks(costs: tuple[int, ...], shards: int, window: int = 1) -> list[tuple[int, int]]:
    """Consecutive (first, last) of each shard, `last` excluded, as even in cost as whole windows of blocks allow.

    Raises Refusal for more shards than there are blocks, or windows.
    """
    if window > 1:
        together = pieces(range(len(costs)), window)
        if shards > len(together):
            raise Refusal(
                f"shards {shards}: {len(costs)} blocks make {len(together)} windows of {window}, and a shard needs "
                f"one; at most {len(together)}"
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
    facts: ModelFacts,
    first: int,
    last: int,
    *,
    resident: str,
    tokens: int,
    step_tokens: int,
    spool_memory: int,
    recipe: Recipe | None,
    gpu: bool,
) -> ShardEstimate:
    """What blocks `first` to `last` need: weights, one unit's training state, activations set aside.

    `peak` is the process's memory on a CPU, the device's on a GPU (where activations wait in the host's memory).
    """
    sizes = facts.block_bytes[first:last]
    ends = facts.ends_bytes if first == 0 or last == facts.blocks else 0
    window = recipe.window if recipe else 1
    weights = ends + (sum(sizes) if resident == "all" else window * max(sizes))
    training, kept = 0, 0.0
    if recipe is not None:
        training = max(_fit_bytes(facts, first, last, step_tokens, recipe), _hessian_bytes(facts, recipe))
        kept = _kept_streams(recipe)
    spooled = int(kept * tokens * facts.hidden * facts.itemsize * (last - first))
    carried = 2 * tokens * facts.hidden * facts.itemsize if resident == "one" or (recipe and recipe.sequential) else 0
    in_memory = min(spooled + carried, spool_memory)
    both = min(training + in_memory, max(training, spool_memory))  # activations make room for the fit
    copied = 0 if first or gpu else facts.copied_at_once
    copy = window * max(sizes)  # the pruned copy of the blocks in work
    if recipe is not None and "importance" in recipe.needs:
        copy += copy // facts.itemsize * 4  # what the shadow says of them
    return ShardEstimate(
        weights=weights,
        training=training,
        spool_memory=in_memory,
        spool_disk=spooled + carried - in_memory,
        peak=weights + copied + copy + (training if gpu else PROCESS_BYTES + both),
    )


def _fit_bytes(facts: ModelFacts, first: int, last: int, step_tokens: int, recipe: Recipe) -> int:
    """Memory that fitting the largest unit takes: bf16 working copy, fp32 master, two moments; the largest gradient
    twice; a step's activations."""
    if recipe.reconstruct == "none":
        return 0
    if recipe.reconstruct == "matrix":
        unit = facts.largest_matrix
    elif recipe.reconstruct == "component":
        unit = max(max(units) for units in facts.unit_parameters[first:last])
    else:
        unit = recipe.window * max(sum(units) for units in facts.unit_parameters[first:last])
    return 14 * unit + 6 * facts.largest_matrix + step_tokens * facts.hidden * 40 * recipe.window


def _hessian_bytes(facts: ModelFacts, recipe: Recipe) -> int:
    """Memory for the Hessians of one group's inputs (an attention's two, say), and for what is made of the largest."""
    if "hessian" not in recipe.needs:
        return 0
    widest = max(into for layers in facts.layers for _, _, into in layers)
    return 4 * (facts.hidden**2 + 4 * widest**2)


def _kept_streams(recipe: Recipe) -> float:
    """How often a block's tokens × hidden states are set aside: inputs and dense outputs of its units."""
    if recipe.reconstruct == "none":
        return 2 if recipe.gathers and not recipe.sequential else 0
    if recipe.reconstruct == "window":
        return (3 if recipe.sweeps else 2) / recipe.window
    if recipe.reconstruct == "block":
        return 3 if recipe.sweeps else 2
    if recipe.reconstruct == "matrix":
        return 16  # what each reads and gives, some of it as wide as the MLP
    return 6 if recipe.sweeps else 4


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
