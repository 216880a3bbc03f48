"""What is pruned together and what is reconstructed together: matrices, components, whole blocks, windows of blocks.

stages/README.md §6. A unit reads one tensor and gives one, so it can be fitted to what it gave when it was dense.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from espalier.stages.errors import Refusal, unknown
from espalier.stages.model.anatomy import Anatomy, Weight
from espalier.stages.model.calls import Call
from espalier.stages.reconstruction.shapes import UnitShape

PLAIN = Call((), {}, None)  # a module that takes its hidden states and nothing else


@dataclass(frozen=True, slots=True)
class Step:
    """One module on the way through a unit: of which block, which one ("" is the block itself), how it is called."""

    block: int
    module: str
    call: Call


@dataclass(frozen=True, slots=True)
class FitUnit:
    """What is reconstructed as one."""

    name: str
    source: str  # the name under which its input is kept: units that read one tensor share it
    steps: tuple[Step, ...]
    weights: tuple[tuple[int, Weight], ...]  # with the block of each
    frozen: tuple[str, ...] = ()  # modules, relative to their block, that are not fitted
    residual: bool = False  # the residual stream is part of its output
    hidden: int | None = None  # how many columns of its output are fitted, the rest travels by; None: all
    share: float = 1.0
    # Of the error accumulated in its input, what it may take back: less where units run in parallel, nothing for what
    # is not added to the stream, as the output of a matrix.

    @property
    def first(self) -> int:
        return self.steps[0].block

    @property
    def last(self) -> int:
        return self.steps[-1].block


@dataclass(frozen=True, slots=True)
class Group:
    """What is scored and masked at once (`whole`), then reconstructed in one fit or several."""

    whole: FitUnit
    fits: tuple[FitUnit, ...]


Anatomies = Mapping[int, Anatomy]
Calls = Mapping[int, Call]


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitKind:
    """A way to cut blocks into what is reconstructed as one, and what the work must know about it."""

    groups: Callable[[Anatomies, Calls], list[Group]]
    """Anatomies and calls of some consecutive blocks -> their groups, in the order data passes them."""
    fits: Callable[[UnitShape], Sequence[UnitShape]]
    """The shape of what is pruned together, a component or whole blocks -> those of what is then fitted."""
    streams: int
    """How often the activations of all tokens are set aside for a unit, as wide as the hidden states: what its fits
    read and what they gave when dense."""
    sweep_streams: int | None
    """How many more with sweeps, for what the fits then read; None: a sweep cannot reconstruct it."""
    written: str
    """How it is written and what it is, for the flag's help."""
    title: str
    """How a report says it, of `blocks` blocks as one."""
    whole_blocks: bool = False
    """A unit is all components of its blocks."""
    numbered: bool = False
    """It is of as many blocks as NAME:N says; they lie on one shard."""


def _components(block: int, anatomy: Anatomy) -> list[FitUnit]:
    together = max(1, sum(unit.parallel for unit in anatomy.units))
    return [
        FitUnit(
            unit.name,
            unit.name,
            tuple(
                Step(block, name, anatomy.calls[unit.name] if name == unit.parts[0] else PLAIN) for name in unit.modules
            ),
            tuple((block, weight) for weight in unit.weights),
            unit.frozen,
            share=(1 / together if unit.parallel else 1.0) if unit.adds else 0.0,
        )
        for unit in anatomy.units
    ]


def _matrices(unit: FitUnit, anatomy: Anatomy) -> tuple[FitUnit, ...]:
    readers = {weight.name: group[0].name for group in anatomy.shared_inputs for weight in group}
    for block, weight in unit.weights:
        if weight.expert is not None:
            raise Refusal(
                f"reconstruct matrix: {weight.name} of block {block} is stored with the other experts; use component"
            )
    return tuple(
        FitUnit(weight.name, readers[weight.name], (Step(block, weight.module, PLAIN),), ((block, weight),), share=0.0)
        for block, weight in unit.weights
    )


def _by_component(anatomies: Anatomies, calls: Calls) -> list[Group]:
    return [Group(unit, (unit,)) for block, anatomy in anatomies.items() for unit in _components(block, anatomy)]


def _by_matrix(anatomies: Anatomies, calls: Calls) -> list[Group]:
    """Raises Refusal for matrices that lie in one tensor with others (experts)."""
    return [
        Group(unit, _matrices(unit, anatomy))
        for block, anatomy in anatomies.items()
        for unit in _components(block, anatomy)
    ]


def _whole(name: str) -> Callable[[Anatomies, Calls], list[Group]]:
    """All of the blocks as one unit of this name."""

    def group(anatomies: Anatomies, calls: Calls) -> list[Group]:
        steps = tuple(Step(block, "", calls[block]) for block in anatomies)
        weights = tuple((block, weight) for block, anatomy in anatomies.items() for weight in anatomy.weights)
        frozen = tuple(name for anatomy in anatomies.values() for unit in anatomy.units for name in unit.frozen)
        frozen = tuple(dict.fromkeys(frozen))
        hidden = next(iter(anatomies.values())).hidden
        whole = FitUnit(name, name, steps, weights, frozen, residual=True, hidden=hidden)
        return [Group(whole, (whole,))]

    return group


def _itself(unit: UnitShape) -> tuple[UnitShape, ...]:
    return (unit,)


UNITS = {
    "matrix": UnitKind(
        groups=_by_matrix,
        fits=lambda unit: unit.alone,
        streams=16,  # what each reads and gives, some of it as wide as the MLP
        sweep_streams=None,
        written="matrix",
        title="matrix by matrix",
    ),
    "component": UnitKind(
        groups=_by_component,
        fits=_itself,
        streams=4,
        sweep_streams=2,
        written="component (attention and MLP apart)",
        title="component by component",
    ),
    "block": UnitKind(
        groups=_whole("block"),
        fits=_itself,
        streams=2,
        sweep_streams=1,
        written="block",
        title="block by block",
        whole_blocks=True,
    ),
    "window": UnitKind(
        groups=_whole("window"),
        fits=_itself,
        streams=2,
        sweep_streams=1,
        written="window:N (N blocks as one)",
        title="{blocks} blocks at a time",
        whole_blocks=True,
        numbered=True,
    ),
}


def find_unit(name: str) -> UnitKind | None:
    """The unit of this name; None for "none". Raises Refusal for a name that the table does not have."""
    if name != "none" and name not in UNITS:
        raise Refusal(f"reconstruct {name!r} {unknown(name, [*UNITS, 'none'])}")
    return UNITS.get(name)


def groups_of(anatomies: Anatomies, calls: Calls, reconstruct: str) -> list[Group]:
    """The groups of some consecutive blocks, in the order data passes them; components where nothing is
    reconstructed.

    Raises Refusal where single matrices are to be reconstructed that lie in one tensor with others (experts).
    """
    return (find_unit(reconstruct) or UNITS["component"]).groups(anatomies, calls)


class UnitModules(nn.Module):
    """A unit's modules as one, holding the blocks' own parameters. Calls are given to `forward`, so that they can be
    cast once and are not copied along with the weights."""

    def __init__(self, unit: FitUnit, blocks: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.prefixes = [f"{step.block}.{step.module}." if step.module else f"{step.block}." for step in unit.steps]
        self.parts = nn.ModuleList(blocks[step.block].get_submodule(step.module) for step in unit.steps)
        self._hidden = unit.hidden
        self._frozen = tuple(f"{step.block}.{name}." for step in unit.steps for name in unit.frozen)

    def forward(self, hidden_SLD: Tensor, calls: Sequence[Call]) -> Tensor:
        for part, call in zip(self.parts, calls, strict=True):
            hidden_SLD = call.run(part, hidden_SLD)
        return hidden_SLD[..., : self._hidden]

    def named(self) -> dict[str, nn.Parameter]:
        """`block.parameter` -> parameter, of all that are fitted."""
        named = {
            f"{prefix}{inside}": parameter
            for prefix, part in zip(self.prefixes, self.parts, strict=True)
            for inside, parameter in part.named_parameters()
        }
        return {name: parameter for name, parameter in named.items() if not name.startswith(self._frozen)}
