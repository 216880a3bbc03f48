"""A shadow in slices, one of each tensor or of each part that a rank holds, and the strips that are worked on."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from espalier.stages.shadow.formats import BLOCK, CHUNK, Kept

STRIP = 2 * CHUNK  # values that leave the device at a time


def parameter_of(name: str) -> tuple[str, int]:
    """A slice's parameter and the element of it that the slice starts at: "mlp.weight@256" as ("mlp.weight", 256)."""
    parameter, at, start = name.rpartition("@")
    return (parameter, int(start)) if at and start.isdigit() else (name, 0)


class ShadowSlice:
    """What is kept of one tensor, or of a slice of a parameter. Places count from `base`, the start of a block."""

    def __init__(self, name: str, shape: Sequence[int], kept: dict[str, Tensor]) -> None:
        self.name, self.shape, self.kept = name, tuple(shape), kept
        self.parameter, self.start = parameter_of(name)
        self.base = self.start // BLOCK * BLOCK
        self.length = math.prod(shape)
        self.end = _padded(self.start - self.base + self.length)

    def overlap(self, other: "ShadowSlice") -> range:
        """The parameter's elements that are in both."""
        if self.parameter != other.parameter:
            return range(0)
        return range(max(self.start, other.start), min(self.start + self.length, other.start + other.length))

    def slot(self, number: int) -> Kept:
        return {name: values[number] for name, values in self.kept.items()}

    def cuts(self, step: int, low: int, high: int) -> Iterator[tuple[int, int]]:
        """The places from `low` to `high`, cut where the parameter's elements are multiples of `step`."""
        while low < high:
            upper = min(high, ((low + self.base) // step + 1) * step - self.base)
            yield low, upper
            low = upper

    def inside(self, low: int, high: int) -> slice:
        """Those elements of the tensor that lie from place `low` to `high`."""
        head = self.start - self.base
        return slice(max(low - head, 0), min(high - head, self.length))


def _padded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


@dataclass(frozen=True, slots=True)
class Strip:
    """Part of a slice that is worked on at a time."""

    number: int
    low: int
    high: int
