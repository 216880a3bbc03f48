"""How a shadow lies in memory: fp32, bf16, bf16 with its remainders, int8 in blocks of 128; and how it is rounded.

Rounding to a grid of step h adds a random number below h and cuts off: right on average, so that updates far smaller
than h are not lost. What lies on the grid already stays as it is, so an update that moves a value by d steps adds an
error of variance at most d · h² (and never more than h²/4).

The random numbers depend on (seed, parameter, element, update) alone, never on how parameters are cut into slices.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Kept = Mapping[str, Tensor]  # what one tensor is kept as: name -> its values, or their scales

BLOCK = 128  # values that share a scale
CHUNK = 1 << 19  # values worked on at a time: few enough for the cache, and enough for all of torch's threads
HEADROOM = 1.125  # a scale that must grow grows by this much more
STEPS = 1 << 16  # of random numbers: what bf16 cuts off of a float32
MASK = (1 << 64) - 1


def _mixed(number: Any) -> Any:
    """A hash of 64 bits (SplitMix64, Steele et al. 2014), of an int or of each of an array of uint64."""
    number = (number + 0x9E3779B97F4A7C15) & MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & MASK
    return number ^ (number >> 31)


class Draws:
    """Random numbers for every element and update: from 0 to STEPS - 1, int32, or as fractions of STEPS, float32.

    A table holds them evenly spread, shuffled, and a stretch of CHUNK elements reads it from a place hashed anew for
    each update: so an element's numbers are uniform and unrelated from update to update, and cost no more than reading.
    """

    def __init__(self, seed: int, fractions: bool) -> None:
        self._seed = seed
        hashes = _mixed(np.arange(CHUNK, dtype=np.uint64) ^ np.uint64(_mixed(seed)))
        table = torch.from_numpy(np.resize(np.argsort(hashes, kind="stable"), 2 * CHUNK)) * STEPS // CHUNK
        # Halves, so that a sum with what lies on the grid is exact, and its floor that very place.
        self._table = ((table + 0.5) / STEPS).float() if fractions else table.int()

    def key(self, parameter: str) -> int:
        """A number of 64 bits for a parameter's name."""
        return int.from_bytes(hashlib.sha256(f"{self._seed}/{parameter}".encode()).digest()[:8], "big")

    def of(self, key: int, update: int, low: int, high: int) -> Tensor:
        """(high - low,): those of elements `low` to `high` of a parameter, in one stretch of CHUNK."""
        place = _mixed(_mixed(key ^ update) ^ (low // CHUNK)) % CHUNK
        return self._table[place + low % CHUNK :][: high - low]


class Format(ABC):
    """One way to keep float32 values. Places count from the start of a block, and so do reads and writes."""

    fractions = False  # whether `write` takes its random numbers as fractions of a step

    @abstractmethod
    def empty(self, slots: int, length: int) -> dict[str, Tensor]:
        """Zeros for `slots` times `length` values (a multiple of BLOCK)."""

    @abstractmethod
    def read(self, kept: Kept, low: int, high: int, room: Tensor) -> Tensor:
        """The values from `low` to `high` as float32, in `room` or where they are kept; they may be changed there."""

    @abstractmethod
    def write(self, kept: Kept, low: int, values: Tensor, draws: Tensor) -> None:
        """Round and keep values (changed in place) from `low` on."""

    def clear(self, kept: Kept, low: int, high: int) -> None:
        """Forget what was kept there, as far as it would shape what is written next."""
        return

    def adopt(self, kept: Kept, at: int, source: Kept, low: int, high: int) -> None:
        """Take over `source`'s values from `low` to `high`, to lie from `at` on, whole blocks away."""
        for name, values in kept.items():
            values[at : at + high - low] = source[name][low:high]


class Float32(Format):
    """4 bytes a value, plain sums: an update is lost when it is below 2⁻²⁵ of its value."""

    def empty(self, slots: int, length: int) -> dict[str, Tensor]:
        return {"value": torch.zeros(slots, length)}

    def read(self, kept: Kept, low: int, high: int, room: Tensor) -> Tensor:
        return kept["value"][low:high]

    def write(self, kept: Kept, low: int, values: Tensor, draws: Tensor) -> None:
        place = kept["value"][low : low + len(values)]
        if place.data_ptr() != values.data_ptr():
            place.copy_(values)


class BFloat16(Format):
    """2 bytes a value, rounded stochastically: h is 2⁻⁸ to 2⁻⁷ of it."""

    def empty(self, slots: int, length: int) -> dict[str, Tensor]:
        return {"value": torch.zeros(slots, length, dtype=torch.bfloat16)}

    def read(self, kept: Kept, low: int, high: int, room: Tensor) -> Tensor:
        return room.copy_(kept["value"][low:high])

    def write(self, kept: Kept, low: int, values: Tensor, draws: Tensor) -> None:
        values.view(torch.int32).add_(draws).bitwise_and_(-STEPS)
        kept["value"][low : low + len(values)] = values


class Compensated(Format):
    """3 bytes a value: bf16, and a byte for what that cuts off, which the next update gets back. Nothing is random.

    Sums of 16 significant bits: what is lost is at most 2⁻¹⁶ of the value each time, and so is an update below that.
    (A remainder of 16 bits would take as much memory as fp32 does.)
    """

    def empty(self, slots: int, length: int) -> dict[str, Tensor]:
        value = torch.zeros(slots, length, dtype=torch.bfloat16)
        return {"value": value, "rest": torch.zeros(slots, length, dtype=torch.uint8)}

    def read(self, kept: Kept, low: int, high: int, room: Tensor) -> Tensor:
        rest = kept["rest"][low:high].int().bitwise_left_shift_(8)
        room.copy_(kept["value"][low:high]).view(torch.int32).bitwise_or_(rest)
        return room

    def write(self, kept: Kept, low: int, values: Tensor, draws: Tensor) -> None:
        bits = values.view(torch.int32).add_(0x80)  # to the nearest
        kept["rest"][low : low + len(values)] = bits >> 8  # its lowest byte
        bits.bitwise_and_(-STEPS)
        kept["value"][low : low + len(values)] = values


class Int8(Format):
    """1 byte a value and a float32 scale h for each BLOCK of them, rounded stochastically: 1.03 bytes.

    A scale that fits stays. It grows, to HEADROOM more than it must, when the largest value of its block is beyond 127
    steps, which rounds all the block anew; it is halved, which rounds nothing, when all are below a third of that.
    Scales made anew at each update would round everything each time: its error would grow with the root of the number
    of updates, and this one's does not.
    """

    fractions = True

    def empty(self, slots: int, length: int) -> dict[str, Tensor]:
        value = torch.zeros(slots, length, dtype=torch.int8)
        return {"value": value, "scale": torch.zeros(slots, length // BLOCK)}

    def read(self, kept: Kept, low: int, high: int, room: Tensor) -> Tensor:
        scale = kept["scale"][low // BLOCK : high // BLOCK]
        room.copy_(kept["value"][low:high]).view(-1, BLOCK).mul_(scale[:, None])
        return room

    def write(self, kept: Kept, low: int, values: Tensor, draws: Tensor) -> None:
        scale = kept["scale"][low // BLOCK :][: len(values) // BLOCK]
        by_block = values.view(-1, BLOCK)
        needed = by_block.abs().amax(1) * ((1 + 1e-6) / 127)
        torch.where(needed < scale / 3, scale / 2, scale, out=scale)
        torch.where(needed > scale, needed * HEADROOM, scale, out=scale)
        by_block.div_(_divisor(scale)[:, None])
        kept["value"][low : low + len(values)] = values.add_(draws).floor_()

    def clear(self, kept: Kept, low: int, high: int) -> None:
        kept["scale"][low // BLOCK : high // BLOCK] = 0

    def adopt(self, kept: Kept, at: int, source: Kept, low: int, high: int) -> None:
        """Exact where blocks are taken over whole; of a block put together from two, one half is rounded anew."""
        first, last = low // BLOCK, -(-high // BLOCK)
        shift = at // BLOCK - first
        mine, theirs = kept["scale"][first + shift : last + shift], source["scale"][first:last]
        scale = torch.maximum(mine, theirs)
        blocks = slice((first + shift) * BLOCK, (last + shift) * BLOCK)
        held, given = kept["value"][blocks].view(-1, BLOCK), source["value"][first * BLOCK : last * BLOCK]
        held.copy_((held * (mine / _divisor(scale))[:, None]).round_())
        taken = (given.view(-1, BLOCK) * (theirs / _divisor(scale))[:, None]).round_()
        kept["value"][at : at + high - low] = taken.view(-1)[low - first * BLOCK :][: high - low]
        mine.copy_(scale)


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)


def format_of(dtype: Literal["fp32", "bf16", "int8"], rounding: Literal["stochastic", "compensated"]) -> Format:
    """The format of these names; `rounding` says how bf16 is rounded."""
    if dtype == "bf16":
        return Compensated() if rounding == "compensated" else BFloat16()
    return Float32() if dtype == "fp32" else Int8()
