"""The first few of each row in some order, where a sort of the row or a selection of half of it would be a waste.

Letters: R = rows, I = columns, K = how many are taken.
"""

import numpy as np
import torch
from torch import Tensor

GROUPS_PER_PLACE = 4  # a row is cut into at least this many groups for each place; fewer groups let more pass the sieve


def smallest(keys_RI: Tensor, count: int, last: float | None = None) -> tuple[Tensor, Tensor]:
    """The `count` smallest keys of each row, ascending, and their columns: both (R, K), K = min(count, I).

    Equal keys: the lower column first (on an accelerator, where the last place is shared, any of those that share it).
    Keys above `last` are not candidates: a row that has fewer than K candidates ends in columns that mean nothing,
    under keys above `last`. `last` is by default the largest finite value of the keys' type. NaN is not allowed.
    """
    rows, columns = keys_RI.shape
    count = min(count, columns)
    kind = torch.finfo(keys_RI.dtype) if keys_RI.dtype.is_floating_point else torch.iinfo(keys_RI.dtype)
    last = kind.max if last is None else last
    if keys_RI.device.type != "cpu":
        values, indices = keys_RI.topk(count, largest=False)
        order = indices.argsort()
        values, again = values.gather(1, order).sort(dim=1, stable=True)
        return values, indices.gather(1, order).gather(1, again)
    groups = GROUPS_PER_PLACE * count
    if columns < 2 * groups:
        values, indices = keys_RI.sort(dim=1, stable=True)
        return values[:, :count], indices[:, :count]
    found = _sieve(keys_RI.numpy(), count, groups, last)
    row_N, column_N = np.divmod(found, columns)
    held_R = np.bincount(row_N, minlength=rows)
    place_N = np.arange(len(found)) - (np.cumsum(held_R) - held_R)[row_N]
    width = max(count, int(held_R.max(initial=0)))
    ragged = np.full((rows, width), np.inf if keys_RI.dtype.is_floating_point else kind.max, dtype=keys_RI.numpy().dtype)
    where = np.zeros((rows, width), dtype=np.int64)
    ragged[row_N, place_N] = keys_RI.numpy().reshape(-1)[found]
    where[row_N, place_N] = column_N
    order_RK = np.argsort(ragged, axis=1, kind="stable")[:, :count]
    values_RK, where_RK = np.take_along_axis(ragged, order_RK, 1), np.take_along_axis(where, order_RK, 1)
    return torch.from_numpy(values_RK), torch.from_numpy(where_RK)


def _sieve(keys: np.ndarray, count: int, groups: int, last: float) -> np.ndarray:
    """Flat places of every candidate that can be among the `count` smallest of its row, and of few others.

    The minima of groups of columns are keys too, so the `count`-th smallest minimum bounds the `count`-th smallest key
    from above; about 1.15 · count keys of a row in random order lie within it. Selecting among the minima costs little
    beside one pass over the row.
    """
    rows, columns = keys.shape
    size = columns // groups  # the columns that fill no group stay out of the bound, not out of the result
    minima = keys[:, : size * groups].reshape(rows, size, groups).min(1)
    bound = np.partition(minima, count - 1, axis=-1)[:, count - 1 : count]
    return np.flatnonzero(keys <= np.minimum(bound, keys.dtype.type(last)))
