"""A cache of a shard's blocks in memory, as they were loaded: all of them, or one (those of one unit) at a time.

With one at a time the next is read by a thread of its own while this one is at work.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from espalier.stages.loading.skeleton import Skeleton
from espalier.stages.metrics.profile import Timeline
from espalier.stages.shard.spec import ShardSpec, block_file, sweep_directory
from espalier.stages.storage.hf_checkpoint import Checkpoint

Source = int | None  # whose blocks: the model's (None), or those that a sweep left
At = tuple[Source, int]  # a block


class BlockCache:
    """The blocks of one source or of several, side by side."""

    def __init__(self, spec: ShardSpec, skeleton: Skeleton, checkpoint: Checkpoint, timeline: Timeline) -> None:
        self.sources: tuple[Source, ...] = (None,)
        self._spec, self._skeleton, self._checkpoint, self._timeline = spec, skeleton, checkpoint, timeline
        self.held: dict[At, nn.Module] = {}  # what is in memory
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._coming: dict[At, Future[nn.Module]] = {}  # what is being read

    def open(self, sources: Sequence[Source]) -> None:
        """Go on with the blocks of `sources`; those of others are let go."""
        self.sources = tuple(sources)
        self._let_go(at for at in [*self.held, *self._coming] if at[0] not in self.sources)
        if self._spec.resident == "all":
            self.hold(range(self._spec.first, self._spec.last))

    def load(self, index: int, source: Source) -> nn.Module:
        """One block as `source` has it, not kept."""
        checkpoint = self._checkpoint
        if source is not None:
            assert self._spec.recipe is not None
            directory = sweep_directory(Path(self._spec.output), source, self._spec.recipe.sweeps)
            checkpoint = Checkpoint.of_file(directory / block_file(index))
        return self._skeleton.load_block(index, checkpoint)

    def hold(self, blocks: Iterable[int], following: Iterable[int] = ()) -> list[dict[int, nn.Module]]:
        """For each source those blocks, loaded if need be. With one at a time in memory all others are let go but those
        `following`, which are read meanwhile."""
        blocks = list(blocks)
        wanted = [(source, index) for source in self.sources for index in blocks]
        if self._spec.resident == "one":
            coming = [(source, index) for source in self.sources for index in following]
            self._let_go({*self.held, *self._coming}.difference(wanted, coming))
        for at in wanted:
            if at not in self.held:
                with self._timeline.phase("load", at[1]):
                    self.held[at] = self._coming.pop(at).result() if at in self._coming else self.load(at[1], at[0])
        if self._spec.resident == "one":
            for at in coming:
                if at not in self.held and at not in self._coming:
                    self._coming[at] = self._reader.submit(self._read, at)
        return [{index: self.held[source, index] for index in blocks} for source in self.sources]

    def _read(self, at: At) -> nn.Module:
        with self._timeline.phase("read", at[1]), torch.no_grad():
            return self.load(at[1], at[0])

    def _let_go(self, blocks: Iterable[At]) -> None:
        for at in list(blocks):
            self.held.pop(at, None)
            if (reading := self._coming.pop(at, None)) is not None:
                reading.cancel()

    def release(self) -> None:
        """Let go of the blocks in memory, unless all are to stay there; what is being read is yet to come."""
        if self._spec.resident == "one":
            self.held.clear()
