"""What is pruned together and what is reconstructed together: matrices, components, whole blocks, windows of blocks.

stages/README.md §6. A unit reads one tensor and gives one, so it can be fitted to what it gave when it was dense.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from espalier.stages.errors import Refusal
from espalier.stages.model.anatomy import Anatomy, Weight
from espalier.stages.model.calls import Call
from espalier.stages.recipe import Reconstruct

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
    share: float = 1.0
    # Of the error accumulated in its input, what it may take back: less where units run in parallel, nothing for a
    # matrix, whose output is not added to the stream.

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


def groups_of(anatomies: Mapping[int, Anatomy], calls: Mapping[int, Call], reconstruct: Reconstruct) -> list[Group]:
    """The groups of some consecutive blocks, in the order data passes them.

    Raises Refusal where single matrices are to be reconstructed that lie in one tensor with others (experts).
    """
    if reconstruct in ("block", "window"):
        steps = tuple(Step(block, "", calls[block]) for block in anatomies)
        weights = tuple((block, weight) for block, anatomy in anatomies.items() for weight in anatomy.weights)
        frozen = tuple(name for anatomy in anatomies.values() for unit in anatomy.units for name in unit.frozen)
        whole = FitUnit(reconstruct, reconstruct, steps, weights, tuple(dict.fromkeys(frozen)), residual=True)
        return [Group(whole, (whole,))]
    groups = []
    for block, anatomy in anatomies.items():
        components = _components(block, anatomy)
        groups += [Group(unit, _matrices(unit, anatomy) if reconstruct == "matrix" else (unit,)) for unit in components]
    return groups


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
            share=1 / together if unit.parallel else 1.0,
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


class UnitModules(nn.Module):
    """A unit's modules as one, holding the blocks' own parameters. Calls are given to `forward`, so that they can be
    cast once and are not copied along with the weights."""

    def __init__(self, unit: FitUnit, blocks: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.prefixes = [f"{step.block}.{step.module}." if step.module else f"{step.block}." for step in unit.steps]
        self.parts = nn.ModuleList(blocks[step.block].get_submodule(step.module) for step in unit.steps)
        self._frozen = tuple(f"{step.block}.{name}." for step in unit.steps for name in unit.frozen)

    def forward(self, hidden_SLD: Tensor, calls: Sequence[Call]) -> Tensor:
        for part, call in zip(self.parts, calls, strict=True):
            hidden_SLD = call.run(part, hidden_SLD)
        return hidden_SLD

    def named(self) -> dict[str, nn.Parameter]:
        """`block.parameter` -> parameter, of all that are fitted."""
        named = {
            f"{prefix}{inside}": parameter
            for prefix, part in zip(self.prefixes, self.parts, strict=True)
            for inside, parameter in part.named_parameters()
        }
        return {name: parameter for name, parameter in named.items() if not name.startswith(self._frozen)}
