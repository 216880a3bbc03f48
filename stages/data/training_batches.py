"""The order of training examples: which a step takes, on which rank, by seed and step whatever the number of ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from espalier.stages.data.token_table import TokenTable


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSpec:
    """Data as plain values: `factory` is "module:name" of what makes a `espalier.stages.data.training_batches.Source`
    from `options`."""

    factory: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """What to train and to evaluate on."""

    data: SourceSpec
    eval: SourceSpec | None = None


IGNORED = -100  # what transformers takes as the label of a token that is not to be predicted


class Source(Protocol):
    """Examples to train on."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Those examples as `model(**batch)` takes them, "labels" among them, so that it gives a loss."""


class TokenWindows:
    """The windows of a token table; every token but each window's first is predicted."""

    def __init__(self, path: str) -> None:
        self._table = TokenTable.open(Path(path))

    def __len__(self) -> int:
        return len(self._table)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """input_ids and labels, the same int64 (windows, length); the model shifts the labels itself."""
        rows = np.stack([self._table.rows(index, index + 1)[0] for index in indices])
        ids = torch.from_numpy(rows.astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def open_source(spec: SourceSpec) -> Source:
    """The examples that `spec` describes."""
    module, _, name = spec.factory.partition(":")
    return cast(Source, getattr(import_module(module), name)(**spec.options))


class Order:
    """Endless passes over `examples` examples, each in an order of its own that depends on (seed, pass) only.

    A step takes the next `batch` examples; one that begins at the end of a pass goes on in the next, so that each pass
    sees every example once, whatever the batch.
    """

    def __init__(self, examples: int, batch: int, seed: int) -> None:
        self._examples, self._batch, self._seed = examples, batch, seed
        self._pass, self._order = -1, np.empty(0, dtype=np.int64)

    def step(self, number: int) -> list[int]:
        """The examples of optimizer step `number`, counted from 0."""
        return [self._at(position) for position in range(number * self._batch, (number + 1) * self._batch)]

    def _at(self, position: int) -> int:
        number, place = divmod(position, self._examples)
        if number != self._pass:
            self._pass, self._order = number, np.random.default_rng([self._seed, number]).permutation(self._examples)
        return int(self._order[place])


def microbatches_of(indices: Sequence[int], size: int, rank: int, ranks: int) -> list[tuple[int, Sequence[int]]]:
    """(number, examples) of the micro-batches that `rank` runs of one step: every `ranks`-th of them.

    How a step is cut into micro-batches does not depend on the number of ranks, so its gradient does not either, but
    for the order in which floating-point sums are taken.
    """
    pieces = [indices[start : start + size] for start in range(0, len(indices), size)]
    return [(number, pieces[number]) for number in range(rank, len(pieces), ranks)]


def predicted_tokens(labels: Tensor) -> int:
    """How many tokens a causal model's loss over these labels (samples, length) is the mean of."""
    return int((labels[:, 1:] != IGNORED).sum())
