"""What is known of a unit before it runs: how many numbers it holds, and how many pass through it for a token."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from torch import nn

from espalier.stages.model.anatomy import Weight, prunable
from espalier.stages.model.families import BlockLayout, head_width

CHOSEN = ("num_experts_per_tok", "moe_top_k", "top_k_experts", "moe_topk")  # what configs call it
HEAD = 128  # channels of an attention head where a config does not say


@dataclass(frozen=True, slots=True)
class Routing:
    """What a config says that shapes do not: experts that a token goes to (0: not said, so all), attention's width,
    and one of its heads'."""

    chosen: int
    attention: int
    head: int

    @classmethod
    def of(cls, config: Any) -> "Routing":
        """As the text model's config has it, or the vision tower's own."""
        text = config.get_text_config()
        heads = getattr(text, "num_attention_heads", None) or 1
        head = head_width(text) or HEAD
        chosen = next((n for name in CHOSEN if (n := getattr(text, name, None))), 0)
        return cls(int(chosen), heads * head, head)


@dataclass(frozen=True, slots=True)
class UnitShape:
    """A unit, in numbers; those of `passing`, `kept` and `flowing` are of one token."""

    parameters: int  # all of its modules'
    largest: int  # of one tensor that holds prunable weights
    matrices: tuple[tuple[int, int], ...]  # (O, I) of the prunable ones
    inputs: tuple[int, ...]  # widths of the tensors that they read, each once
    outputs: int  # width of what it gives
    passing: int  # what its matrices read and give
    kept: int  # what a forward pass keeps for the backward pass
    flowing: int  # what the backward pass holds at most beside that
    experts: int = 0
    attention: int = 0  # width of the heads of an attention together
    head: int = 0  # of one of them

    @property
    def prunable(self) -> int:
        return sum(outputs * inputs for outputs, inputs in self.matrices)

    @property
    def alone(self) -> tuple["UnitShape", ...]:
        """Each of its matrices as a unit."""
        return tuple(_unit(o * i, o * i, ((o, i),), (i,), o, _passing(((o, i),), 1)) for o, i in self.matrices)


def joined(*units: UnitShape) -> UnitShape:
    """Units as one: all keep, one flows at a time."""
    attention = max(units, key=lambda unit: unit.attention)
    return UnitShape(
        parameters=sum(unit.parameters for unit in units),
        largest=max(unit.largest for unit in units),
        matrices=tuple(matrix for unit in units for matrix in unit.matrices),
        inputs=tuple(width for unit in units for width in unit.inputs),
        outputs=units[-1].outputs,
        passing=max(unit.passing for unit in units),
        kept=sum(unit.kept for unit in units),
        flowing=max(unit.flowing for unit in units),
        experts=sum(unit.experts for unit in units),
        attention=attention.attention,
        head=attention.head,
    )


def component_shapes(block: nn.Module, layout: BlockLayout, routing: Routing) -> tuple[UnitShape, ...]:
    """The components of a block, which may lie on the meta device."""
    return tuple(
        _component(block, weights, tuple(f"{part}." for part in layout.parts(name)), routing)
        for name, weights in prunable(block, layout).items()
    )


def _component(block: nn.Module, weights: Sequence[Weight], parts: tuple[str, ...], routing: Routing) -> UnitShape:
    tensors = {name: tensor.numel() for name, tensor in block.state_dict().items() if name.startswith(parts)}
    shapes = {weight: _shape(block, weight) for weight in weights}
    plain = [shapes[weight] for weight in weights if weight.expert is None]
    first = [shapes[weight] for weight in weights if weight.expert == 0]
    experts = len({weight.expert for weight in weights if weight.expert is not None})
    inputs = [*_read(plain), *(_read(first) * experts)]
    chosen = min(routing.chosen or experts, experts)
    width, last = _passing(first, chosen)
    sent = chosen * (first[0][1] + first[-1][0]) if first else 0  # each expert's tokens brought together, and weighed
    unit = _unit(
        parameters=sum(tensors.values()),
        largest=max(tensors[weight.parameter] for weight in weights),
        matrices=tuple(shapes.values()),
        inputs=tuple(inputs),
        outputs=(first or plain)[-1][0],
        passing=tuple(a + b for a, b in zip(_passing(plain, 1), (width + sent, last), strict=True)),
    )
    attends = bool(plain) and plain[-1][1] == routing.attention  # or is as wide as one
    return replace(
        unit, experts=experts, attention=routing.attention if attends else 0, head=routing.head if attends else 0
    )


def _shape(block: nn.Module, weight: Weight) -> tuple[int, int]:
    outputs, inputs = weight.of(block.get_parameter(weight.parameter)).shape
    return outputs, inputs


def _read(matrices: Sequence[tuple[int, int]]) -> list[int]:
    """The widths of what matrices read, in their order: neighbours of one width share it, but the last reads its own
    (an attention's output projection is often as wide as the others)."""
    if not matrices:
        return []
    return [*(width for width, _ in groupby(inputs for _, inputs in matrices[:-1])), matrices[-1][1]]


def _passing(matrices: Sequence[tuple[int, int]], times: int) -> tuple[int, int]:
    """What `times` such chains of matrices read and give for a token, and what their last ones read."""
    if not matrices:
        return 0, 0
    return times * (sum(outputs for outputs, _ in matrices) + sum(_read(matrices))), times * matrices[-1][1]


def _unit(
    parameters: int,
    largest: int,
    matrices: tuple[tuple[int, int], ...],
    inputs: tuple[int, ...],
    outputs: int,
    passing: tuple[int, ...],
) -> UnitShape:
    """A chain of matrices keeps about what it reads and gives twice, for what lies between them keeps as much; but of
    what the last one reads, once. That flows back when it has been stepped, twice: as it came, and as it goes on."""
    width, last = passing
    kept, flowing = 2 * width - 2 * last, 2 * last
    return UnitShape(parameters, largest, matrices, inputs, outputs, width, kept, flowing)
