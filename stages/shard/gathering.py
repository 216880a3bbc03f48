"""Statistics of what a unit's weights read, gathered when its turn comes: from its kept inputs, sent through it again.

With corrected targets a unit's weights are pruned stage by stage, those that read one tensor together, in the order
data passes them. What a later stage reads then comes from weights that are pruned already, and is x̃ where the dense
unit has x: beside G = Σ x̃ x̃ᵀ the cross sums C = Σ x̃ xᵀ are gathered, from which the layer's values also take back
what those before it lost. stages/README.md §5b.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from espalier.stages.model.anatomy import Anatomy, Weight
from espalier.stages.model.hooks import SeenInput, activation_hooks
from espalier.stages.precision import computing
from espalier.stages.reconstruction.units import FitUnit, UnitModules
from espalier.stages.shard.calibration import Counting, new_statistics
from espalier.stages.statistics import InputStatistics
from espalier.stages.storage.spool import Spool
from espalier.stages.storage.staging import prefetch

PASS_TOKENS = 2048  # run through a unit at a time where its activations are needed once more

Seer = Callable[[int, tuple[Weight, ...], Tensor], None]  # of a block, weights that read one tensor, and that tensor
Gathered = dict[int, dict[str, InputStatistics]]  # block -> weight name -> statistics of what it reads


class _Seen(Exception):
    """Ends a pass when all that was looked for has been seen."""


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


def batches(
    samples: Spool, device: str, *others: Spool, chosen: Sequence[int] | None = None
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """All samples, or those `chosen`, in order, a few at a time, with their numbers, on the device, and those of
    `others` with them; the next are on their way meanwhile."""
    step = max(1, PASS_TOKENS // len(samples[0])) if len(samples) and not samples.ragged else 1
    chosen = range(len(samples)) if chosen is None else chosen
    numbers = [list(chosen[start : start + step]) for start in range(0, len(chosen), step)]
    made = ([functools.partial(spool.batch, indices) for spool in (samples, *others)] for indices in numbers)
    for indices, ready in zip(numbers, prefetch(made, device), strict=True):
        yield indices, [batch() for batch in ready]


@dataclass(frozen=True)
class Dense:
    """The dense model beside which statistics are gathered: the unit's blocks as they were, and what it reads there."""

    modules: Mapping[int, nn.Module]
    inputs: Spool


def gather(
    unit: FitUnit,
    stage: Stage,
    modules: Mapping[int, nn.Module],
    given: Spool,
    needs: frozenset[str],
    device: str,
    dense: Dense | None = None,
    samples: Sequence[int] | None = None,
) -> Gathered:
    """Statistics of what the stage's weights read when the unit, as it is in `modules`, is given `given`, or `samples`
    of it; with `dense` also the cross sums with what they read in the dense unit.

    Raises Refusal for a NaN or an infinity in what is read, naming block, weight and sample.
    """
    gathered = {block: new_statistics(anatomy, modules[block], needs) for block, anatomy in stage.anatomies.items()}
    counts = {block: Counting(gathered[block], modules[block], f"calibration, block {block}") for block in gathered}
    waiting: dict[tuple[int, str], list[Tensor]] = {}  # what the dense unit read, until the pruned one has read it

    def seen_dense(block: int, group: tuple[Weight, ...], x: Tensor) -> None:
        waiting.setdefault((block, group[0].name), []).append(x)

    def seen(block: int, group: tuple[Weight, ...], x: Tensor) -> None:
        counts[block](group, x)
        if dense is not None:
            gathered[block][group[0].name].update_cross(x, waiting[block, group[0].name].pop(0))

    chain, calls = UnitModules(unit, modules), [step.call for step in unit.steps]
    dense_chain = chain if dense is None else UnitModules(unit, dense.modules)
    beside = () if dense is None or dense.inputs is given else (dense.inputs,)
    with computing(chain), computing(dense_chain):
        for numbers, batch in batches(given, device, *beside, chosen=samples):
            called = [call.at(numbers) for call in calls]
            if dense is not None:
                with _watched(unit, stage, dense.modules, seen_dense, len(numbers)):
                    dense_chain(batch[-1], called)
            with _watched(unit, stage, modules, seen, len(numbers)):
                chain(batch[0], called)
            for count in counts.values():
                count.settle()
    return gathered


@contextmanager
def _watched(unit: FitUnit, stage: Stage, modules: Mapping[int, nn.Module], see: Seer, samples: int) -> Iterator[None]:
    """Within it a pass through the unit hands `see` what the stage's weights read, and ends when all has been seen."""
    unseen = {
        (block, group[0].name): samples for block, anatomy in stage.anatomies.items() for group in anatomy.shared_inputs
    }

    def seeing(block: int) -> SeenInput:
        def hook(group: tuple[Weight, ...], x: Tensor) -> None:
            see(block, group, x)
            unseen[block, group[0].name] -= len(x)
            if not stage.experts and not any(unseen.values()):
                raise _Seen

        return hook

    with ExitStack() as hooks:
        for block, anatomy in stage.anatomies.items():
            root = next(step.module for step in unit.steps if step.block == block)
            hooks.enter_context(activation_hooks(modules[block], anatomy, seeing(block), root=root))
        hooks.enter_context(torch.no_grad())
        with suppress(_Seen):
            yield
