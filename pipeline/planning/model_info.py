"""Sizes of a model and the names of its tensors, from config and headers: no weight is read.

Sizes come from the model built on the meta device, checked against the checkpoint's headers.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from espalier.pipeline.record.run_record import ModelRecord
from espalier.stages.errors import Refusal
from espalier.stages.loading.accounted import check_tensors, remarks
from espalier.stages.loading.ends import ENDS_FILE_BYTES
from espalier.stages.loading.skeleton import Skeleton, tied_names
from espalier.stages.loading.vision import SKELETONS
from espalier.stages.model.anatomy import prunable
from espalier.stages.model.families import Tower, sees_images
from espalier.stages.precision import weights_dtype
from espalier.stages.reconstruction.shapes import Routing, UnitShape, component_shapes
from espalier.stages.storage.hf_checkpoint import Checkpoint

SAMPLED_STRETCHES, STRETCH_BYTES = 64, 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """Sizes of one model, in bytes as it is stored."""

    path: str
    family: str
    tower: Tower
    packed: bool  # samples differ in length, and so pass through the blocks one at a time
    dtype: str  # of its weights, most of them
    hidden: int
    travels: int  # numbers a token that go from block to block: hidden states and what goes with them
    vocabulary: int
    context: int
    parameters: int
    ends_bytes: int  # outside the blocks, held by the first or the last shard
    first_parameters: int  # of these, what the first shard loads: all but the head
    last_parameters: int  # what the last one loads: all but the embedding and what looks at images
    only_parameters: int  # what one shard that is both loads; tied tensors count once
    copied_bytes: int  # outside the blocks, only copied
    copied_at_once: int  # of these, what is in memory together
    block_bytes: tuple[int, ...]
    block_parameters: tuple[int, ...]
    components: tuple[tuple[UnitShape, ...], ...]  # of each block
    linears: tuple[tuple[str, int, int], ...]  # (checkpoint name, out, in) of every prunable tensor, all its experts'
    stored: tuple[tuple[int, ...], ...]  # their shapes on disk
    layers: tuple[tuple[tuple[str, int, int], ...], ...]  # of each block's: (name as reports call it, out, in)
    remarks: tuple[str, ...] = ()  # what of the checkpoint is not read, in lines to be told

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

    def summary(self) -> ModelRecord:
        """For run.json."""
        return {
            "path": self.path,
            "family": self.family,
            "tower": self.tower,
            "images": sees_images(self.family),
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
) -> ModelInfo:
    """Sizes from the config alone, names as the checkpoint has them (without it: as transformers would save them).

    Raises Refusal for a family that is not known here, for the vision tower of one that has none, and for a checkpoint
    that lacks what the model reads, or holds it quantised.
    """
    weights_in = weights_dtype(config, dtype, checkpoint)
    skeleton = SKELETONS[tower](config, weights_in, checkpoint=checkpoint)
    held = _Held(skeleton, checkpoint if dtype == "auto" else None, weights_in.itemsize)
    unread = 0
    if checkpoint is not None:
        check_tensors(skeleton, checkpoint)
        unread = sum(checkpoint.entry(name).bytes for name in skeleton.storage.unread)
    linears, stored, units, sizes, counts, layers = [], [], [], [], [], []
    routing = Routing.of(config)
    for index, layer in enumerate(skeleton.layers):
        tensors = layer.state_dict()
        names = skeleton.parameters_of(index)
        sizes.append(sum(held.bytes(names[inside], tensor.numel()) for inside, tensor in tensors.items()))
        counts.append(sum(tensor.numel() for tensor in tensors.values()))
        units.append(component_shapes(layer, skeleton.layout, routing))
        matrices = [weight for members in prunable(layer, skeleton.layout).values() for weight in members]
        layers.append(tuple((w.name, *w.of(layer.get_parameter(w.parameter)).shape) for w in matrices))
        weights = {weight.parameter: weight for weight in matrices}
        for parameter, weight in weights.items():
            into = weight.of(tensors[parameter]).shape[1]
            for name, matrix in skeleton.stored(index, {parameter: tensors[parameter]}).items():
                linears.append((name, matrix.numel() // into, into))
                stored.append(tuple(matrix.shape))
    tied = tied_names(skeleton.model)
    outside = {name: p.numel() for name, p in skeleton.model.named_parameters() if name not in tied}
    copied = [held.bytes(name, size) for name, size in outside.items() if name not in skeleton.ends]
    sizes_outside = {name: p.numel() for name, p in skeleton.model.named_parameters()}

    def ends_of(embedding: bool, head: bool) -> int:
        names = set(skeleton.ends_wanted(embedding, head).values()) | (skeleton.vision if embedding else set())
        return sum(sizes_outside[name] for name in names)

    return ModelInfo(
        path=path,
        family=config.model_type,
        tower=tower,
        packed=skeleton.layout.packed,
        dtype=str(weights_in).removeprefix("torch."),
        hidden=skeleton.hidden_size,
        travels=max(skeleton.columns(index) for index in range(len(skeleton.layers))),
        vocabulary=skeleton.vocabulary,
        context=skeleton.context,
        parameters=sum(counts) + sum(outside.values()),
        ends_bytes=sum(held.bytes(name, size) for name, size in outside.items() if name in skeleton.ends),
        first_parameters=ends_of(embedding=True, head=False),
        last_parameters=ends_of(embedding=False, head=True),
        only_parameters=ends_of(embedding=True, head=True),
        copied_bytes=sum(copied) + unread,
        copied_at_once=min(sum(copied) + unread, max(ENDS_FILE_BYTES, max(copied, default=0))),
        block_bytes=tuple(sizes),
        block_parameters=tuple(counts),
        components=tuple(units),
        linears=tuple(linears),
        layers=tuple(layers),
        stored=tuple(stored),
        remarks=tuple(remarks(skeleton, checkpoint)) if checkpoint is not None else (),
    )


@dataclass(frozen=True, slots=True)
class _Held:
    """How large parameters are as they lie in a checkpoint, or without one in a dtype of so many bytes."""

    skeleton: Skeleton
    checkpoint: Checkpoint | None
    itemsize: int

    def bytes(self, name: str, size: int) -> int:
        """Of the parameter of that name, `size` numbers."""
        if self.checkpoint is not None and name in self.skeleton.storage:
            return sum(self.checkpoint.entry(part).bytes for part in self.skeleton.storage.of(name).names)
        return size * self.itemsize


def check_headers(facts: ModelInfo, checkpoint: Checkpoint) -> str:
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
