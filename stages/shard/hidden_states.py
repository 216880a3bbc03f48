"""The hidden states of a whole pass, kept between two blocks where a shard takes its blocks one at a time."""

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from espalier.stages.errors import OutOfStep
from espalier.stages.storage.hf_checkpoint import write_tensors
from espalier.stages.storage.spool import Spool, SpoolBudget
from espalier.stages.storage.staging import Make, Room, prefetch


class KeptStates:
    """The dense model's last hidden states of a stream, one file a microbatch.

    On disk and not in memory: they are read once, in order, after all the work, for which the memory is needed; and a
    restarted shard, or another model's, finds them again.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def _file(self, microbatch: int) -> Path:
        return self._directory / f"states-{microbatch:06d}.safetensors"

    def put(self, microbatch: int, hidden: Tensor) -> None:
        """Keep (S, T, D), bits unchanged. Raises Refusal when the disk is full."""
        self._directory.mkdir(parents=True, exist_ok=True)
        write_tensors(self._file(microbatch), {"hidden": hidden})

    def get(self, microbatch: int) -> Tensor:
        """What was put as number `microbatch`. Raises OutOfStep if it is not here."""
        try:
            return load_file(self._file(microbatch))["hidden"]
        except FileNotFoundError:
            raise OutOfStep(f"{self._directory}: no states of microbatch {microbatch}") from None

    def holds(self, microbatches: int) -> bool:
        """Whether all of so many microbatches are here."""
        return all(self._file(number).is_file() for number in range(microbatches))

    def clear(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)


class HiddenStateBuffer:
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
