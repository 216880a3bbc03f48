"""A whole pass of hidden states between two blocks, where blocks are taken one at a time."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from stages.spool import Spool, SpoolBudget
from stages.staging import Make, Room, prefetch


class Carry:
    """Microbatches, received in order, that then go through block after block together.

    `block`: the block whose input they are. `samples`: all of them, one record a sample. `device`: where blocks run.
    """

    def __init__(self, directory: Path, budget: SpoolBudget, block: int, device: str) -> None:
        self._directory, self._budget, self._device = directory, budget, device
        self.block = block
        self.samples = self._spool(block)
        self._sizes: list[int] = []
        self._following = 0  # the number of the microbatch that `_coming` gives next
        self._coming: Iterator[Tensor] = iter(())

    def __len__(self) -> int:
        return len(self._sizes)

    def _spool(self, block: int) -> Spool:
        return Spool(self._directory / f"carry-{block:05d}.arrow", self._budget)

    def receive(self, hidden: Tensor) -> None:
        """Take in one more microbatch (samples, length, hidden)."""
        self.samples.append(hidden)
        self._sizes.append(len(hidden))

    def microbatch(self, number: int, room: Room | None = None) -> Tensor:
        """What `receive` took in as number `number`, as it now is."""
        start = sum(self._sizes[:number])
        return self.samples.batch(list(range(start, start + self._sizes[number])), room)

    def on_device(self, number: int) -> Tensor:
        """The same where blocks run; asked for in order, the next is on its way meanwhile."""
        if number != self._following or not number:
            self._coming = self._from(number)
        self._following = number + 1
        return next(self._coming)

    def _from(self, number: int) -> Iterator[Tensor]:
        made: Iterator[list[Make]] = ([functools.partial(self.microbatch, n)] for n in range(number, len(self)))
        return (given() for (given,) in prefetch(made, self._device))

    def advance(self, run: Callable[[Tensor], Tensor], block: int) -> None:
        """Every microbatch becomes what `run` makes of it: the input of `block`."""
        following = self._spool(block)
        for hidden in self._from(0):
            following.append(run(hidden))
        self.samples.close()
        self.samples, self.block, self._following = following, block, 0

    def close(self) -> None:
        self._coming = iter(())
        self.samples.close()
