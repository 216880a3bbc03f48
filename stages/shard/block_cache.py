"""A cache of a shard's blocks in memory, as they were loaded: all of them, or one (those of one unit) at a time."""

from collections.abc import Iterable
from pathlib import Path

from torch import nn

from espalier.stages.loading.skeleton import Skeleton
from espalier.stages.shard.spec import ShardSpec, block_file, sweep_directory
from espalier.stages.storage.hf_checkpoint import Checkpoint


class BlockCache:
    """The blocks of `source`: the model's (None), or those that a sweep left."""

    def __init__(self, spec: ShardSpec, skeleton: Skeleton, checkpoint: Checkpoint) -> None:
        self.source: int | None = None
        self._spec, self._skeleton, self._checkpoint = spec, skeleton, checkpoint
        self.held: dict[int, nn.Module] = {}  # what is in memory

    def open(self, source: int | None) -> None:
        """Let go of what is here and go on with the blocks of `source`."""
        self.source = source
        self.held.clear()
        if self._spec.resident == "all":
            self.hold(range(self._spec.first, self._spec.last))

    def load(self, index: int, source: int | None) -> nn.Module:
        """One block as `source` has it, not kept."""
        checkpoint = self._checkpoint
        if source is not None:
            assert self._spec.recipe is not None
            directory = sweep_directory(Path(self._spec.output), source, self._spec.recipe.sweeps)
            checkpoint = Checkpoint.of_file(directory / block_file(index))
        return self._skeleton.load_block(index, checkpoint)

    def hold(self, blocks: Iterable[int]) -> dict[int, nn.Module]:
        """Those blocks, loaded if need be; with one block in memory at a time all others are let go."""
        if self._spec.resident == "one":
            for index in self.held.keys() - set(blocks):
                del self.held[index]
        for index in blocks:
            if index not in self.held:
                self.held[index] = self.load(index, self.source)
        return {index: self.held[index] for index in blocks}

    def release(self) -> None:
        """Let go of all blocks, unless all are to stay in memory."""
        if self._spec.resident == "one":
            self.held.clear()
