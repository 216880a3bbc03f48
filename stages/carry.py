"""A whole pass of hidden states between two blocks, where blocks are taken one at a time."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from stages.spool import Spool, SpoolBudget


class Carry:
    """Microbatches, received in order, that then go through block after block together.

    `block`: the block whose input they are. `samples`: all of them, one record a sample.
    """

    def __init__(self, directory: Path, budget: SpoolBudget, block: int) -> None:
        self._directory, self._budget = directory, budget
        self.block = block
        self.samples = self._spool(block)
        self._sizes: list[int] = []

    def __len__(self) -> int:
        return len(self._sizes)

    def _spool(self, block: int) -> Spool:
        return Spool(self._directory / f"carry-{block:05d}.arrow", self._budget)

    def receive(self, hidden: Tensor) -> None:
        """Take in one more microbatch (samples, length, hidden)."""
        self.samples.append(hidden)
        self._sizes.append(len(hidden))

    def microbatch(self, number: int) -> Tensor:
        """What `receive` took in as number `number`, as it now is."""
        start = sum(self._sizes[:number])
        return self.samples.batch(list(range(start, start + self._sizes[number])))

    def advance(self, run: Callable[[Tensor], Tensor], block: int) -> None:
        """Every microbatch becomes what `run` makes of it: the input of `block`."""
        following = self._spool(block)
        for number in range(len(self)):
            following.append(run(self.microbatch(number)))
        self.samples.close()
        self.samples, self.block = following, block

    def close(self) -> None:
        self.samples.close()
