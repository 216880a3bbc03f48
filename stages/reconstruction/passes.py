"""Passes through a unit, one after the other while its weights are pruned: each goes on from what those before it kept.

stages/README.md §5b, corrected targets.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from espalier.stages.model.anatomy import Anatomy, Closing, Weight
from espalier.stages.model.hooks import SeenInput, activation_hooks
from espalier.stages.reconstruction.units import FitUnit, UnitModules
from espalier.stages.storage.spool import Spool
from espalier.stages.storage.staging import Room, prefetch

PASS_TOKENS = 2048  # run through a unit at a time where its activations are needed once more

Seer = Callable[[int, tuple[Weight, ...], Tensor], None]  # of a block, weights that read one tensor, and that tensor
Place = tuple[int, str]  # a block and the name of a weight inside it


class _Seen(Exception):
    """Ends a pass when all that was looked for has been seen."""


class _Kept:
    """What passes kept of some samples, asked for by their numbers, as a spool of all is."""

    def __init__(self, spool: Spool) -> None:
        self._spool, self._places = spool, dict[int, int]()

    def append(self, numbers: Sequence[int], samples: Tensor) -> None:
        for number in numbers:
            self._places[number] = len(self._places)
        self._spool.append(samples)

    def batch(self, numbers: Sequence[int], room: Room | None = None) -> Tensor:
        return self._spool.batch([self._places[number] for number in numbers], room)

    def close(self) -> None:
        self._spool.close()


Source = Spool | _Kept


def portions(samples: Spool, chosen: Sequence[int] | None = None) -> list[list[int]]:
    """The numbers of all samples, or of those `chosen`, in order, as many together as pass through a unit at a time."""
    step = max(1, PASS_TOKENS // len(samples[0])) if len(samples) and not samples.ragged else 1
    chosen = range(len(samples)) if chosen is None else chosen
    return [list(chosen[start : start + step]) for start in range(0, len(chosen), step)]


def batches(numbers: Sequence[list[int]], device: str, sources: Sequence[Source]) -> Iterator[list[Tensor]]:
    """Portion after portion of the samples, on the device, as each of the sources has them; the next are on their way
    meanwhile."""
    made = ([functools.partial(source.batch, portion) for source in sources] for portion in numbers)
    return ([batch() for batch in ready] for ready in prefetch(made, device))


class UnitPasses:
    """A unit in one model, the dense one or the pruned one, and the passes of `given`, what it reads there.

    What they keep, where `spool` makes spools of a name: what reaches a block, once the unit's blocks before it are
    pruned, so that passes start there; and what the matrices of `closing`, the last of their components, read: from
    then on nothing else of the component is computed. With `final` no weight will change.
    """

    def __init__(
        self,
        unit: FitUnit,
        modules: Mapping[int, nn.Module],
        given: Spool,
        spool: Callable[[str], Spool] | None = None,
        closing: Mapping[Place, Closing] = MappingProxyType({}),
        final: bool = False,
    ) -> None:
        self.unit, self.modules, self.given, self.chain = unit, modules, given, UnitModules(unit, modules)
        self.closing, self._spool, self._final = closing, spool, final
        self._start = 0  # the step that passes start at, and what it reads
        self._entry: Source = given
        self._read: dict[Place, _Kept] = {}  # what matrices of `closing` read

    @property
    def sources(self) -> list[Source]:
        """What a pass is made of."""
        return [self._entry, *self._read.values()]

    @contextmanager
    def watched(self, anatomies: Mapping[int, Anatomy], see: Seer, whole: bool = False) -> Iterator["WatchedPasses"]:
        """Within it passes hand `see` what the weights of `anatomies` read, and end when all has been seen, unless they
        are to go through the `whole` unit. Later ones go on from what they kept."""
        passes = WatchedPasses(self, anatomies, see, whole)
        with passes.hooked():
            yield passes
        self._read |= passes.keeping
        if passes.entering is not None:
            before, (self._start, self._entry) = self._entry, passes.entering
            self._drop([at for at in self._read if at[0] < self.unit.steps[self._start].block])
            if before is not self.given:
                before.close()

    def _drop(self, places: Sequence[Place]) -> None:
        for at in places:
            self._read.pop(at).close()

    def close(self) -> None:
        """Let go of all that is kept."""
        self._drop(list(self._read))
        if self._entry is not self.given:
            self._entry.close()

    # -- what the passes that begin now can keep, and what they can leave out ----------------------------------------

    def to_keep(self, read: Collection[Place], whole: bool) -> dict[Place, _Kept]:
        """Of the matrices of `closing`, those whose input is what it will stay, and is in these passes."""
        return {
            (block, name): self._new(block, name)
            for block, name in self.closing
            if (block, name) not in self._read and ((block, name) in read or (whole and self._final))
        }

    def to_enter(self, blocks: Collection[int]) -> tuple[int, _Kept] | None:
        """The step at which the passes come to the last of these blocks, if they begin in one before it."""
        steps, last = self.unit.steps, max(blocks)
        place = next(place for place, step in enumerate(steps) if step.block == last)
        if self._spool is None or steps[self._start].block == last:
            return None
        return place, self._new(last, "entry")

    def _new(self, block: int, name: str) -> _Kept:
        assert self._spool is not None
        return _Kept(self._spool(f"block-{block:05d}-{name}.{'dense' if self._final else 'pruned'}"))

    @contextmanager
    def resumed(self, read: Collection[Place], loaded: Callable[[], Mapping[Source, Tensor]]) -> Iterator[None]:
        """Within it components of which it is known what their last matrix reads are that matrix alone, unless others
        of their weights are in `read`."""

        def ending(block: nn.Module, closing: Closing, kept: _Kept) -> Callable[..., Any]:
            return lambda *args, **kwargs: closing.output(block, loaded()[kept])

        with ExitStack() as replaced:
            for (block, name), kept in self._read.items():
                closing = self.closing[block, name]
                if any(at == block and closing.comes_after(other) for at, other in read):
                    continue
                component = self.modules[block].get_submodule(closing.component)
                component.forward = ending(self.modules[block], closing, kept)
                replaced.callback(delattr, component, "forward")
            yield

    def run(self, numbers: Sequence[int], loaded: Mapping[Source, Tensor], entering: tuple[int, _Kept] | None) -> None:
        """One pass, of samples that were loaded from the sources."""
        hidden = loaded[self._entry]
        for place in range(self._start, len(self.unit.steps)):
            if entering is not None and place == entering[0]:
                entering[1].append(numbers, hidden)
            hidden = self.unit.steps[place].call.at(numbers).run(self.chain.parts[place], hidden)


class WatchedPasses:
    """Passes of a stage: see `UnitPasses.watched`."""

    def __init__(self, unit: UnitPasses, anatomies: Mapping[int, Anatomy], see: Seer, whole: bool) -> None:
        self._unit, self._see, self._whole = unit, see, whole
        self._groups = {block: list(anatomy.shared_inputs) for block, anatomy in anatomies.items()}
        self._read = [(block, group[0].name) for block, groups in self._groups.items() for group in groups]
        names = {(block, w.name) for block, groups in self._groups.items() for group in groups for w in group}
        self.keeping = unit.to_keep(names, whole)
        self.entering = None if whole else unit.to_enter(self._groups)
        for block, name in self.keeping.keys() - names:
            self._groups.setdefault(block, []).append((unit.closing[block, name].weight,))
        self._numbers: Sequence[int] = ()
        self._loaded: Mapping[Source, Tensor] = {}
        self._unseen: dict[Place, int] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Within it the unit is ready for passes."""
        with self._unit.resumed(self._read, lambda: self._loaded), ExitStack() as hooks:
            for block, groups in self._groups.items():
                root = next(step.module for step in self._unit.unit.steps if step.block == block)
                anatomy = Anatomy([], groups, {})
                hooks.enter_context(
                    activation_hooks(self._unit.modules[block], anatomy, self._seeing(block), root=root)
                )
            yield

    def _seeing(self, block: int) -> SeenInput:
        def hook(group: tuple[Weight, ...], x: Tensor) -> None:
            for at in ((block, weight.name) for weight in group):
                if at in self.keeping:
                    self.keeping[at].append(self._numbers, x)
            if (block, group[0].name) not in self._unseen:
                return
            self._see(block, group, x)
            self._unseen[block, group[0].name] -= len(x)
            if not self._whole and not any(self._unseen.values()):
                raise _Seen

        return hook

    def run(self, numbers: Sequence[int], loaded: Mapping[Source, Tensor]) -> None:
        """One pass, of samples as they were loaded from the unit's sources."""
        self._numbers, self._loaded = numbers, loaded
        self._unseen = dict.fromkeys(self._read, len(numbers))
        with torch.no_grad(), suppress(_Seen):
            self._unit.run(numbers, loaded, self.entering)
        self._loaded = {}
