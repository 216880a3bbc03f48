"""A cache of a shard's blocks in memory, as they were loaded: all of them, or one (those of one unit) at a time."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn

from espalier.stages.loading.skeleton import Skeleton
from espalier.stages.shard.spec import ShardSpec, block_file, sweep_directory
from espalier.stages.storage.hf_checkpoint import Checkpoint

Source = int | None  # whose blocks: the model's (None), or those that a sweep left


class BlockCache:
    """The blocks of one source or of several, side by side."""

    def __init__(self, spec: ShardSpec, skeleton: Skeleton, checkpoint: Checkpoint) -> None:
        self.sources: tuple[Source, ...] = (None,)
        self._spec, self._skeleton, self._checkpoint = spec, skeleton, checkpoint
        self.held: dict[tuple[Source, int], nn.Module] = {}  # what is in memory

    def open(self, sources: Sequence[Source]) -> None:
        """Go on with the blocks of `sources`; those of others are let go."""
        self.sources = tuple(sources)
        for source, index in [at for at in self.held if at[0] not in self.sources]:
            del self.held[source, index]
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

    def hold(self, blocks: Iterable[int]) -> list[dict[int, nn.Module]]:
        """For each source those blocks, loaded if need be; with one at a time in memory all others are let go."""
        wanted = [(source, index) for source in self.sources for index in blocks]
        if self._spec.resident == "one":
            for at in self.held.keys() - set(wanted):
                del self.held[at]
        for source, index in wanted:
            if (source, index) not in self.held:
                self.held[source, index] = self.load(index, source)
        return [{index: self.held[source, index] for index in blocks} for source in self.sources]

    def release(self) -> None:
        """Let go of all blocks, unless all are to stay in memory."""
        if self._spec.resident == "one":
            self.held.clear()
