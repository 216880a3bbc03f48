"""How a model's parameters lie in its checkpoint: under which names, and experts in how many pieces.

Inside a model all experts of a block are one tensor; on disk each expert has its own. A checkpoint of the bare base
model lacks a prefix, and published ones use names older than today's modules. The rules are transformers' own: what it
would read into a parameter is what we read, and a pruned block is written under the names that it was read from.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from espalier.stages.errors import Refusal
from espalier.stages.storage.headers import DTYPES
from espalier.stages.storage.hf_checkpoint import Checkpoint, grouped

LOADED_AT_A_TIME = 256 << 20  # bytes of experts' matrices on their way into their common tensor


@dataclass(frozen=True, slots=True)
class MappedWeight:
    """One parameter on disk: a single tensor, or a matrix an expert.

    `experts[e]` are the matrices of expert e in the order in which they lie along its outputs: (gate, up), or (down,).
    """

    whole: str | None = None
    experts: tuple[tuple[str, ...], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.whole,) if self.whole is not None else tuple(name for parts in self.experts for name in parts)

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """The parameter, or anything of its shape, as what lies on disk: name -> a view of it."""
        if self.whole is not None:
            return {self.whole: tensor}
        return {
            name: part
            for expert, names in zip(tensor, self.experts, strict=True)
            for name, part in zip(names, expert.chunk(len(names)), strict=True)
        }


class WeightMapping:
    """Parameter name -> `MappedWeight`, for a model and the names in its checkpoint's headers.

    Without names, those under which transformers would save the model.
    """

    def __init__(self, model: PreTrainedModel, shapes: Mapping[str, torch.Size], names: Iterable[str] | None) -> None:
        self.shapes = shapes
        if names is None:
            names = revert_weight_conversion(model, {n: torch.empty(s, device="meta") for n, s in shapes.items()})
        transforms = get_model_conversion_mapping(model)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        self.unread: dict[str, str] = {}  # name on disk -> by the model's names, where it has no such parameter
        pieces: dict[str, dict[str, list[str]]] = {}
        for name in names:
            parameter, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, dict(shapes))
            if parameter not in shapes:
                self.unread[name] = parameter
                continue
            if pattern is not None:
                _check_operations(name, by_pattern[pattern])
            pieces.setdefault(parameter, {}).setdefault(pattern or "", []).append(name)
        order = {pattern: position for position, pattern in enumerate(by_pattern)}
        self._stored = {
            parameter: self._pieced(parameter, {p: found[p] for p in sorted(found, key=lambda p: order.get(p, -1))})
            for parameter, found in pieces.items()
        }

    def _pieced(self, parameter: str, found: dict[str, list[str]]) -> MappedWeight:
        if "" in found:
            return MappedWeight(whole=found[""][0])
        experts = self.shapes[parameter][0]
        for names in found.values():
            if len(names) != experts:
                raise Refusal(f"{names[0]}: there are {len(names)} of its kind, config.json says {experts} experts")
        return MappedWeight(experts=tuple(zip(*(sorted(names, key=_natural) for names in found.values()), strict=True)))

    def __contains__(self, parameter: str) -> bool:
        return parameter in self._stored

    def of(self, parameter: str) -> MappedWeight:
        """Where the parameter lies; one that the checkpoint lacks, under its own name (to be missed on loading)."""
        return self._stored.get(parameter) or MappedWeight(whole=parameter)

    def load(
        self, checkpoint: Checkpoint, parameters: Iterable[str], dtype: torch.dtype | None, device: str
    ) -> dict[str, Tensor]:
        """The named parameters in `dtype`, or as they are stored, from a checkpoint that uses these names.

        Raises Refusal if one is missing or of another shape than the config says.
        """
        wanted = {parameter: self.of(parameter) for parameter in parameters}
        whole = {parameter: stored.whole for parameter, stored in wanted.items() if stored.whole is not None}
        tensors = checkpoint.load(whole.values(), dtype=dtype, device=device)
        loaded = {parameter: self._fitting(name, tensors[name], parameter) for parameter, name in whole.items()}
        for parameter, stored in wanted.items():
            if stored.whole is None:
                loaded[parameter] = self._load_experts(checkpoint, parameter, stored, dtype, device)
        return loaded

    def _load_experts(
        self, checkpoint: Checkpoint, parameter: str, stored: MappedWeight, dtype: torch.dtype | None, device: str
    ) -> Tensor:
        entries = [checkpoint.entry(name) for name in stored.names]
        if dtype is None:  # one that holds each of them exactly
            dtype = functools.reduce(torch.promote_types, {DTYPES.get(e.dtype, torch.float32) for e in entries})
        stack = torch.empty(self.shapes[parameter], dtype=dtype, device=device)
        places = stored.split(stack)
        for group in grouped(entries, LOADED_AT_A_TIME):
            for name, tensor in checkpoint.load([e.name for e in group], dtype=dtype, device=device).items():
                if tensor.shape != places[name].shape:
                    raise _misfit(name, tensor.shape, places[name].shape)
                places[name].copy_(tensor)
        return stack

    def _fitting(self, name: str, tensor: Tensor, parameter: str) -> Tensor:
        if tensor.shape != self.shapes[parameter]:
            raise _misfit(name, tensor.shape, self.shapes[parameter])
        return tensor


def _misfit(name: str, found: torch.Size, wanted: torch.Size) -> Refusal:
    return Refusal(f"{name} is {tuple(found)}, config.json says {tuple(wanted)}; fetch both again")


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts expert 10 behind expert 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _check_operations(name: str, converter: WeightConverter) -> None:
    operations = [type(operation) for operation in converter.operations]
    stacks = operations in ([MergeModulelist], [MergeModulelist, Concatenate])
    if not stacks or any(getattr(op, "dim", None) != dim for dim, op in enumerate(converter.operations)):
        steps = ", ".join(operation.__name__ for operation in operations)
        raise Refusal(f"{name}: transformers reads it by {steps}, which is not supported here")
