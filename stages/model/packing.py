"""What blocks hand on where it is more than one tensor of hidden states: packed into one, a row a token.

Gemma 3n's blocks give several streams of hidden states, read an embedding of each token that was made for them alone,
and the last of them read the keys and values that earlier ones left in a mapping. So that a block has one input and one
output here too, all that is still needed travels packed, (samples, length, columns): the hidden states first, then what
blocks have left for later ones, then what later blocks are to be given. What that is, is found by running the model's
own code around its layers, and its layers on the meta device: nothing about it is written down for a family.
"""

from collections import UserDict
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from espalier.stages.errors import Refusal
from espalier.stages.model.calls import Call, Place

SIZES = ((2, 5), (3, 7))  # (samples, length) of the two runs that tell a tensor's axes apart


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor among those that travel: `place` () is the hidden states, (argument,) what layer number `layer` is
    given, (mapping, key, number) what a layer leaves in a mapping for later ones."""

    place: tuple[Any, ...]
    layer: int  # 0 where it is no argument
    axes: tuple[int, ...]  # of the tensor: samples, length, then the others
    memory: tuple[int, ...]  # its axes as they lie in memory, outermost first: other strides could round otherwise
    sizes: tuple[int, ...]  # of the other axes

    @property
    def columns(self) -> int:
        return prod(self.sizes)

    def rows(self, tensor: Tensor) -> Tensor:
        """The tensor as (samples, length, columns)."""
        return tensor.permute(self.axes).flatten(2)

    def tensor(self, rows_SLC: Tensor) -> Tensor:
        """What `rows` was made of, in memory as it lay there."""
        shaped = rows_SLC.unflatten(2, self.sizes).permute(_inverse(self.axes))
        return shaped.permute(self.memory).contiguous().permute(_inverse(self.memory))


def _inverse(axes: Sequence[int]) -> list[int]:
    return [axes.index(axis) for axis in range(len(axes))]


@dataclass(frozen=True, slots=True)
class Packing:
    """The parts that travel together, in the order of their columns."""

    parts: tuple[Part, ...]

    @property
    def columns(self) -> int:
        return sum(part.columns for part in self.parts)

    def pack(self, tensors: Mapping[Part, Tensor]) -> Tensor:
        """The parts' tensors as one, (samples, length, columns)."""
        return torch.cat([part.rows(tensors[part]) for part in self.parts], dim=-1)

    def unpack(self, packed: Tensor) -> dict[Part, Tensor]:
        """What was packed, by its parts."""
        columns = packed.split([part.columns for part in self.parts], dim=-1)
        return {part: part.tensor(rows) for part, rows in zip(self.parts, columns, strict=True)}


@dataclass(frozen=True, slots=True)
class Passage:
    """How one layer is passed by what travels."""

    before: Packing
    after: Packing
    given: tuple[Part, ...]  # the layer's own arguments among it
    reads: tuple[Part, ...]  # what it reads of the mapping
    leaves: tuple[Part, ...]  # what it leaves there and a later layer reads
    mapping: Place | None  # which argument the mapping is
    kind: type[MutableMapping[Any, Any]]

    @property
    def hidden(self) -> Part:
        """The hidden states."""
        return self.before.parts[0]

    def around(self, run: Callable[..., Any], call: Call, packed: Tensor) -> Tensor:
        """What travels on from the layer, whose own code is `run`."""
        held = self.before.unpack(packed)
        mapping = mapped(self.kind, {part: held[part] for part in self.reads})
        changes: dict[Place, Any] = {part.place[0]: held[part] for part in self.given}
        if self.mapping is not None:
            changes[self.mapping] = mapping
        held[self.hidden] = call.having(changes).run(run, held[self.hidden])
        for part in self.leaves:
            _, key, number = part.place
            held[part] = mapping[key][number]
        return self.after.pack(held)

    def emptied(self, call: Call) -> Call:
        """The layer's call without what travels."""
        places = [part.place[0] for part in self.given] + ([] if self.mapping is None else [self.mapping])
        return call.having(dict.fromkeys(places))


def mapped(kind: type[MutableMapping[Any, Any]], tensors: Mapping[Part, Tensor]) -> MutableMapping[Any, Any]:
    """A mapping that holds such parts of one as layers find them there: key -> tensors."""
    found: dict[Any, tuple[Tensor, ...]] = {}
    for part, tensor in tensors.items():  # in the order of their numbers
        _, key, _ = part.place
        found[key] = (*found.get(key, ()), tensor)
    made = kind()
    made.update(found)
    return made


class Packed:
    """Mixed into the class of a layer that takes and gives what travels packed; the layer's own code runs inside."""

    passage: Passage

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """(samples, length, columns) -> the same of what travels on."""
        call, packed = Call.seen(args, kwargs), Call.hidden_of(args, kwargs)
        return self.passage.around(super().forward, call, packed)  # type: ignore[misc]


def pack_layers(layers: Sequence[nn.Module], passages: Sequence[Passage]) -> None:
    """From now on each layer takes and gives what travels packed."""
    for layer, passage in zip(layers, passages, strict=True):
        layer.__class__ = type(type(layer).__name__, (Packed, type(layer)), {})
        layer.passage = passage  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class PackedCall(Call):
    """The call of a component that reads what layers before it left in a mapping: that, too, is its input, packed
    behind its hidden states."""

    packing: Packing
    mapping: Place
    kind: type[MutableMapping[Any, Any]]

    def run(self, module: Callable[..., Any], hidden: Tensor) -> Tensor:
        """The module's output on `hidden` (samples, length, columns)."""
        held = self.packing.unpack(hidden)
        alone = held.pop(self.packing.parts[0])
        return Call.run(self.having({self.mapping: mapped(self.kind, held)}), module, alone)

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What a module called with those arguments is given, as `run` takes it."""
        mapping, (own, *others) = Call.seen(args, kwargs).arguments[self.mapping], self.packing.parts
        read = {part: mapping[part.place[1]][part.place[2]] for part in others}
        return self.packing.pack({own: self.hidden_of(args, kwargs), **read})

    @property
    def more(self) -> bool:
        """Whether it is given more than hidden states."""
        return len(self.packing.parts) > 1


def inner_call(passage: Passage | None, call: Call, hidden: Tensor) -> Call:
    """How a component is called on `hidden` (samples, length, width) by a layer that is passed so."""
    if passage is None or passage.mapping is None:
        return call
    place = next((place for place, value in call.arguments.items() if isinstance(value, passage.kind)), None)
    if place is None:
        return call
    own = Part((), 0, (0, 1, 2), (0, 1, 2), (hidden.shape[-1],))
    emptied = call.having({place: None})
    packing = Packing((own, *passage.reads))
    return PackedCall(emptied.args, emptied.kwargs, call.keyword, packing=packing, mapping=place, kind=passage.kind)


def passage_of(module: nn.Module) -> Passage | None:
    """How the layer is passed by what travels; None for one that takes and gives hidden states alone."""
    return module.passage if isinstance(module, Packed) else None


# -- finding it --------------------------------------------------------------------------------------------------------

Left = tuple[Any, int]  # (key, number) in the mapping
Given = tuple[Call, Tensor]  # how a layer is called, and its hidden states
Calls = Callable[[int, int], list[Given]]  # (samples, length) -> of each layer, for embedded tokens with a gradient


@dataclass(frozen=True, slots=True)
class _Run:
    """What was seen of each layer in one run of the model."""

    hidden: Tensor
    given: list[dict[Place, Tensor]]  # the layers' arguments that hang on the tokens
    mapping: Place | None
    kind: type[MutableMapping[Any, Any]]
    read: list[set[Any]]  # keys of the mapping
    left: list[dict[Left, Tensor]]


def found_passages(layers: Sequence[nn.Module], calls: Calls, dtype: torch.dtype) -> list[Passage]:
    """How each layer is passed by what travels; empty where hidden states (samples, length, width) are all of it.

    An argument that has a gradient hangs on the tokens, and so does what layers leave in a mapping that all of them are
    given. Raises Refusal for what has not a row for each token, or travels in another dtype than `dtype`.
    """
    small = _run(layers, calls(*SIZES[0]), range(len(layers)))
    large = _run(layers, calls(*SIZES[1]), [layer for layer, made in enumerate(small.left) if made])
    hidden = _part((), 0, small.hidden, large.hidden, dtype)
    if small.hidden.ndim == 3 and not any(small.given) and not any(small.read):
        return []
    given = [
        tuple(_part((place,), layer, few, large.given[layer][place], dtype) for place, few in arguments.items())
        for layer, arguments in enumerate(small.given)
    ]
    left: list[dict[Left, Part]] = [
        {at: _part((small.mapping, *at), 0, few, large.left[layer][at], dtype) for at, few in made.items()}
        for layer, made in enumerate(small.left)
    ]
    made = {at: part for parts in left for at, part in parts.items()}
    boundaries = []
    for start in range(len(layers) + 1):
        behind = {at for parts in left[:start] for at in parts}
        wanted = {key for keys in small.read[start:] for key in keys}
        waiting = [part for at, part in made.items() if at in behind and at[0] in wanted]
        boundaries.append(Packing((hidden, *waiting, *(part for parts in given[start:] for part in parts))))
    return [
        Passage(
            before,
            after,
            given[layer],
            tuple(part for at, part in made.items() if at[0] in small.read[layer]),
            tuple(made[at] for at in left[layer] if made[at] in after.parts),
            small.mapping,
            small.kind,
        )
        for layer, (before, after) in enumerate(pairwise(boundaries))
    ]


def _part(place: tuple[Any, ...], layer: int, small: Tensor, large: Tensor, dtype: torch.dtype) -> Part:
    """The part that was `small` in the first of the two runs and `large` in the second."""
    by_run = list(zip(small.shape, large.shape, strict=True))
    each = list(zip(*SIZES, strict=True))  # sizes of the samples' axis in both, and of the length's
    others = [axis for axis, sizes in enumerate(by_run) if sizes[0] == sizes[1]]
    name = ", ".join(map(str, place)) or "hidden states"
    if sorted(by_run[axis] for axis in range(small.ndim) if axis not in others) != sorted(each) or not others:
        raise Refusal(
            f"{name}, {tuple(small.shape)} for {SIZES[0][0]} samples of {SIZES[0][1]} tokens, travels between the "
            "blocks: no row a token, and nothing else is passed on here; give a model of another family"
        )
    if small.dtype != dtype:
        raise Refusal(f"{name} travels between the blocks in {small.dtype}, not in {dtype}; use --compute fp32")
    memory = sorted(range(large.ndim), key=lambda axis: large.stride(axis), reverse=True)
    axes = (*(by_run.index(sizes) for sizes in each), *others)
    return Part(place, layer, axes, tuple(memory), tuple(small.shape[axis] for axis in others))


def _run(layers: Sequence[nn.Module], called: list[Given], looking: Collection[int]) -> _Run:
    """What is seen of the layers, of their mapping only in those of the numbers `looking`."""
    calls = [call for call, _ in called]
    given = [
        {place: value for place, value in call.arguments.items() if isinstance(value, Tensor) and value.requires_grad}
        for call in calls
    ]
    shared = {
        place
        for place, value in calls[0].arguments.items()
        if isinstance(value, MutableMapping) and not isinstance(value, dict)
    }
    mapping = next(iter(shared), None)
    if mapping is None:
        return _Run(called[0][1], given, None, dict, [set() for _ in layers], [{} for _ in layers])
    watched = _Watched()
    read, left = [], []
    for number, (layer, (call, hidden)) in enumerate(zip(layers, called, strict=True)):
        watched.forget()
        if number in looking:
            _on_meta(layer, call.having({mapping: watched}), hidden)
        read.append(watched.read)
        left.append({(k, i): tensor for k, values in watched.written.items() for i, tensor in enumerate(values)})
    return _Run(called[0][1], given, mapping, type(calls[0].arguments[mapping]), read, left)


def _on_meta(layer: nn.Module, call: Call, hidden: Tensor) -> None:
    """Run the layer as it is called, every tensor's shape alone."""
    there = {name: _shape_alone(tensor) for name, tensor in (*layer.named_parameters(), *layer.named_buffers())}
    args, kwargs = tree_map_only(Tensor, _shape_alone, (call.args, call.kwargs))
    with torch.no_grad():
        Call(args, kwargs, call.keyword).run(
            lambda *args, **kwargs: functional_call(layer, there, args, kwargs), _shape_alone(hidden)
        )


class _Watched(UserDict[Any, Any]):
    """A mapping that knows what of it was read, and what was left in it."""

    def __init__(self) -> None:
        super().__init__()
        self.forget()

    def forget(self) -> None:
        """What was read and left before is not to be told again."""
        self.read: set[Any] = set()
        self.written: dict[Any, tuple[Tensor, ...]] = {}

    def __getitem__(self, key: Any) -> Any:
        if key not in self.written:
            self.read.add(key)
        return super().__getitem__(key)

    def __setitem__(self, key: Any, item: Any) -> None:
        self.written[key] = tuple(item)
        super().__setitem__(key, item)


def _shape_alone(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
