"""The hidden states of a whole pass at one block: kept for the work to start from, or on their way block by block."""

import functools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from espalier.stages.errors import OutOfStep
from espalier.stages.storage.hf_checkpoint import write_tensors
from espalier.stages.storage.spool import Spool
from espalier.stages.storage.staging import Make, Room, prefetch


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """What one shard does in a pass of microbatches."""

    microbatches: int
    streams: int = 1  # how often each sample travels, one behind the other in a microbatch: as the dense model has it,
    # and as the pruned one has
    keeps: int | None = None  # the sweep whose work here starts from what arrives, which is kept for it
    onward: bool = True  # what arrives goes through the shard's blocks
    shares: bool = False  # and what OWL weighs them by is gathered there
    phase: Literal["stream", "evaluate"] = "evaluate"  # what its time goes to


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
    """Microbatches of one stream, received in order, that then go through block after block together.

    `block`: the block whose input they are. `samples`: all of them, one record a sample. `spool` makes an empty spool
    for the input of a block. `device`: where blocks run.
    """

    def __init__(self, spool: Callable[[int], Spool], block: int, device: str) -> None:
        self._spool, self._device = spool, device
        self.block = block
        self.samples = spool(block)
        self._borrowed = False  # the samples are another's
        self._sizes: list[int] = []
        self._following = 0  # the number of the microbatch that `_coming` gives next
        self._coming: Iterator[Tensor] = iter(())

    def __len__(self) -> int:
        return len(self._sizes)

    def borrow(self, other: "HiddenStateBuffer") -> None:
        """Start from what `other` holds, which stays there."""
        self.samples, self._sizes, self._borrowed = other.samples, list(other._sizes), True

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

    def advance(self, run: Callable[[Tensor], Tensor], block: int, keep: bool = True) -> int:
        """Every microbatch becomes what `run` makes of it, the input of `block`; without `keep` nobody wants it.
        Returns how many tokens there were."""
        following, tokens = self._spool(block), 0
        for hidden in self._from(0):
            tokens += hidden.shape[0] * hidden.shape[1]
            made = run(hidden)
            if keep:
                following.append(made)
        self.close()
        self.samples, self.block, self._following, self._borrowed = following, block, 0, False
        return tokens

    def close(self) -> None:
        self._coming = iter(())
        if not self._borrowed:
            self.samples.close()


class HiddenStreams:
    """All streams of a pass at one block: of each sample what the dense model gives there, or the pruned one, or both.

    `buffers`: a buffer a stream.
    """

    def __init__(self, buffers: list[HiddenStateBuffer], microbatches: int) -> None:
        self.buffers, self._microbatches = buffers, microbatches

    @property
    def block(self) -> int:
        """The block whose input they are; the last stream is the last to go on."""
        return self.buffers[-1].block

    @property
    def whole(self) -> bool:
        """Whether all microbatches are here."""
        return len(self.buffers[-1]) == self._microbatches > 0

    def receive(self, hidden: Tensor) -> None:
        """Take in one more microbatch, its streams one behind the other: (streams · samples, length, hidden)."""
        for buffer, part in zip(self.buffers, hidden.chunk(len(self.buffers)), strict=True):
            buffer.receive(part)

    def borrow(self, other: "HiddenStreams") -> None:
        """Start from what `other` holds, which stays there."""
        for buffer, lender in zip(self.buffers, other.buffers, strict=True):
            buffer.borrow(lender)

    def microbatch(self, number: int) -> Tensor:
        """What `receive` took in as number `number`, as it now is."""
        return together([buffer.microbatch(number) for buffer in self.buffers])

    def on_device(self, number: int) -> list[Tensor]:
        """The same where blocks run, a tensor a stream."""
        return [buffer.on_device(number) for buffer in self.buffers]

    @property
    def said(self) -> str:
        return f"{len(self.buffers[-1])} of {self._microbatches} inputs of block {self.block}"

    def spill(self) -> None:
        """Move them to disk."""
        for buffer in self.buffers:
            buffer.samples.spill()

    def close(self) -> None:
        for buffer in self.buffers:
            buffer.close()


def together(parts: list[Tensor]) -> Tensor:
    """A microbatch's streams as one tensor, one behind the other."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
