"""Statistics of what a unit's weights read, gathered when its turn comes: from its kept inputs, sent through it again.

With corrected targets a unit's weights are pruned stage by stage, those that read one tensor together, in the order
data passes them. What a later stage reads then comes from weights that are pruned already, and is x̃ where the dense
unit has x: beside G = Σ x̃ x̃ᵀ the cross sums C = Σ x̃ xᵀ are gathered, from which the layer's values also take back
what those before it lost. stages/README.md §5b.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from torch import Tensor, nn

from espalier.stages.model.anatomy import Anatomy, Closing, Weight
from espalier.stages.precision import computing
from espalier.stages.reconstruction.passes import Place, UnitPasses, batches, portions
from espalier.stages.reconstruction.units import FitUnit
from espalier.stages.shard.calibration import Counting, new_statistics
from espalier.stages.statistics import InputStatistics

WIDE = 2  # times what a component gives: an input of its last matrix up to so wide is kept
Gathered = dict[int, dict[str, InputStatistics]]  # block -> weight name -> statistics of what it reads


@dataclass(frozen=True)
class Stage:
    """Weights of a unit that are pruned together: block -> the part of its anatomy that they are."""

    anatomies: dict[int, Anatomy]
    experts: bool = False  # they are experts' (and, without corrected targets, all the others)

    def parameters(self) -> dict[tuple[int, str], list[Weight]]:
        """Block and stored tensor -> its weights."""
        found: dict[tuple[int, str], list[Weight]] = {}
        for block, anatomy in self.anatomies.items():
            for weight in (weight for group in anatomy.shared_inputs for weight in group):
                found.setdefault((block, weight.parameter), []).append(weight)
        return found


def stages_of(unit: FitUnit, anatomies: Mapping[int, Anatomy], corrected: bool) -> list[Stage]:
    """The unit's weights, all at once, or with corrected targets by what they read, in the order data passes them.

    Experts go first, on what they read in the dense unit: once weights before them are pruned other tokens may come to
    them, and nothing pairs those with the dense model's.
    """
    groups = [
        (block, group)
        for block in blocks_of(unit)
        for group in anatomies[block].reading_alike({weight.name for at, weight in unit.weights if at == block})
    ]
    if not corrected:
        return [_stage(groups, experts=True)]
    experts = [at for at in groups if at[1][0].expert is not None]
    plain = [at for at in groups if at[1][0].expert is None]
    first = [_stage(experts, experts=True)] if experts else []
    return [*first, *(_stage([at], experts=False) for at in plain)]


def _stage(groups: Sequence[tuple[int, tuple[Weight, ...]]], experts: bool) -> Stage:
    shared: dict[int, list[tuple[Weight, ...]]] = {}
    for block, group in groups:
        shared.setdefault(block, []).append(group)
    return Stage({block: Anatomy([], members, {}) for block, members in shared.items()}, experts)


def blocks_of(unit: FitUnit) -> list[int]:
    """The unit's blocks."""
    return list(dict.fromkeys(step.block for step in unit.steps))


def closing_of(
    stages: Sequence[Stage], anatomies: Mapping[int, Anatomy], modules: Mapping[int, nn.Module]
) -> dict[Place, Closing]:
    """The weights of these stages that components end with, those whose input is worth keeping: not so wide that to
    keep it would cost more than to compute it again."""
    found: dict[Place, Closing] = {}
    for block, anatomy in ((block, anatomy) for stage in stages for block, anatomy in stage.anatomies.items()):
        read = {weight for group in anatomy.shared_inputs for weight in group}
        for closing in (unit.closing for unit in anatomies[block].units):
            if closing is not None and closing.weight in read:
                weight = closing.weight
                outputs, inputs = weight.of(modules[block].get_parameter(weight.parameter)).shape
                if inputs <= WIDE * outputs:
                    found[block, weight.name] = closing
    return found


def gather(
    unit: UnitPasses,
    stage: Stage,
    needs: frozenset[str],
    device: str,
    dense: UnitPasses | None = None,
    samples: Sequence[int] | None = None,
) -> Gathered:
    """Statistics of what the stage's weights read when the unit, as it is, is given all that it is given, or `samples`
    of it; with `dense` also the cross sums with what they read in the dense unit.

    Raises Refusal for a NaN or an infinity in what is read, naming block, weight and sample.
    """
    modules = unit.modules
    gathered = {block: new_statistics(anatomy, modules[block], needs) for block, anatomy in stage.anatomies.items()}
    counts = {block: Counting(gathered[block], modules[block], f"calibration, block {block}") for block in gathered}
    waiting: dict[Place, list[Tensor]] = {}  # what the dense unit read, until the pruned one has read it

    def seen_dense(block: int, group: tuple[Weight, ...], x: Tensor) -> None:
        waiting.setdefault((block, group[0].name), []).append(x)

    def seen(block: int, group: tuple[Weight, ...], x: Tensor) -> None:
        counts[block](group, x)
        if dense is not None:
            gathered[block][group[0].name].update_cross(x, waiting[block, group[0].name].pop(0))

    with ExitStack() as held:
        walked = [] if dense is None else [(dense, seen_dense)]
        walked.append((unit, seen))
        for passes, _ in walked:
            held.enter_context(computing(passes.chain))
        numbers = portions(unit.given, samples)
        sources = list(dict.fromkeys(source for passes, _ in walked for source in passes.sources))
        watched = [held.enter_context(passes.watched(stage.anatomies, see, stage.experts)) for passes, see in walked]
        for portion, batch in zip(numbers, batches(numbers, device, sources), strict=True):
            loaded = dict(zip(sources, batch, strict=True))
            for passing in watched:
                passing.run(portion, loaded)
            for count in counts.values():
                count.settle()
    return gathered
