"""The k smallest keys of each row, for a k much smaller than the row: faster than a sort or a selection.

Letters: R = rows, I = columns, K = how many are taken of a row.
"""

import numpy as np
import torch
from torch import Tensor

GROUPS_PER_PLACE = 4  # a row is cut into this many groups for each place; with fewer, more keys pass the sieve


class TopK:
    """Takes in keys a few rows at a time, while they are in the cache; gives out the `count` smallest of every row.

    Keys above `last` are not candidates; by default that is +inf alone, or the type's largest integer. No NaN.
    """

    def __init__(self, count: int, last: float | None = None) -> None:
        self.count, self.last = count, last
        self._rows = 0
        self._found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # rows, columns, keys of what passed
        self._taken: list[tuple[Tensor, Tensor]] = []  # keys and columns (R, K): accelerators select at once

    def add(self, keys_RI: Tensor) -> None:
        """Take in the keys of the next rows; all calls have the same number of columns and the same type."""
        self._count = min(self.count, keys_RI.shape[1])
        if keys_RI.device.type != "cpu":
            self._taken.append(_select(keys_RI, self._count))
            return
        keys = keys_RI.numpy()
        flat = np.flatnonzero(keys <= self._bound(keys))
        row = flat // keys.shape[1]
        self._found.append((row + self._rows, flat - row * keys.shape[1], keys.reshape(-1)[flat]))
        self._rows += len(keys)

    def take(self) -> tuple[Tensor, Tensor]:
        """Keys in ascending order, and their columns: both (R, K), K = min(count, I), for all rows so far.

        Equal keys: the lower column first (on an accelerator, of those that share the last place, any).
        A row that has fewer than K candidates ends in keys above `last`, whose columns mean nothing.
        """
        if self._taken:
            return torch.cat([keys for keys, _ in self._taken]), torch.cat([columns for _, columns in self._taken])
        row_N, column_N, key_N = (np.concatenate(parts) for parts in zip(*self._found, strict=True))
        held_R = np.bincount(row_N, minlength=self._rows)
        place_N = np.arange(len(row_N)) - (np.cumsum(held_R) - held_R)[row_N]
        shape = self._rows, max(self._count, int(held_R.max()))
        keys = np.full(shape, np.inf if key_N.dtype.kind == "f" else np.iinfo(key_N.dtype).max, key_N.dtype)
        columns = np.zeros(shape, dtype=np.int64)
        keys[row_N, place_N] = key_N
        columns[row_N, place_N] = column_N
        order_RK = np.argsort(keys, axis=1, kind="stable")[:, : self._count]
        keys, columns = np.take_along_axis(keys, order_RK, 1), np.take_along_axis(columns, order_RK, 1)
        return torch.from_numpy(keys), torch.from_numpy(columns)

    def _bound(self, keys: np.ndarray) -> np.ndarray:
        """What no candidate among the `count` smallest of its row exceeds: (R, 1).

        The minima of groups of columns are keys too, so the `count`-th smallest of the minima is at least the
        `count`-th smallest key; about 1.15 · count keys of a row in random order lie within it. A selection among the
        minima costs little beside one pass over the row.
        """
        kind = np.finfo(keys.dtype) if keys.dtype.kind == "f" else np.iinfo(keys.dtype)
        last = keys.dtype.type(kind.max if self.last is None else self.last)
        groups = GROUPS_PER_PLACE * self._count
        size = keys.shape[1] // groups
        if size < 2:
            return np.full((len(keys), 1), last)
        minima = keys[:, : size * groups].reshape(len(keys), size, groups).min(1)  # the rest is not needed for a bound
        return np.minimum(np.partition(minima, self._count - 1, axis=-1)[:, self._count - 1 : self._count], last)


def _select(keys_RI: Tensor, count: int) -> tuple[Tensor, Tensor]:
    keys, columns = keys_RI.topk(count, largest=False)
    columns, order = columns.sort()
    keys, order = keys.gather(1, order).sort(dim=1, stable=True)
    return keys, columns.gather(1, order)
