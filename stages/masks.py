"""Keep masks from scores. A mask is always `keep`: True = the weight survives. Methods §3.

Letters: O = output rows, I = input columns, G = groups of M neighbours along the inputs.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from stages.errors import Refusal

Scope = Literal["row", "matrix"]
CHUNK_ELEMENTS = 1 << 17  # scores partitioned at a time, so that the copy stays in the cache


def check_sparsity(sparsity: float) -> float:
    """The ratio itself. Raises Refusal unless 0 <= sparsity < 1."""
    if not 0 <= sparsity < 1:  # also true of nan
        raise Refusal(f"sparsity {sparsity}: the share of weights to remove must be at least 0 and below 1; try 0.5")
    return sparsity


def check_pattern(pattern: tuple[int, int]) -> tuple[int, int]:
    """The pattern (N, M) itself. Raises Refusal unless 1 <= N <= M."""
    keep, group = pattern
    if not 1 <= keep <= group:
        raise Refusal(f"pattern {keep}:{group}: N of every M weights are kept, so 1 <= N <= M; try 2:4")
    return pattern


def check_divisible(in_features: int, pattern: tuple[int, int], layer: str = "weight") -> None:
    """Raises Refusal unless groups of M fill a row of `in_features` inputs, naming the layer."""
    keep, group = pattern
    if in_features % group:
        raise Refusal(
            f"{layer}: {in_features} inputs cannot be cut into groups of {group}, "
            f"so the pattern {keep}:{group} does not fit; choose another pattern or --sparsity"
        )


def keep_mask(
    scores: Tensor,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    scope: Scope = "row",
) -> Tensor:
    """Bool (O, I), True = keep, from scores (O, I): the lowest go, and among equals the lower index goes first.

    `sparsity` s removes exactly int(I · s) of each row, or int(O · I · s) of the matrix with `scope="matrix"`.
    `pattern` (N, M) keeps exactly N of every M consecutive inputs. Give one of the two.
    Raises Refusal for a ratio outside [0, 1), N > M, N < 1, or rows that groups of M do not fill.
    """
    if (sparsity is None) == (pattern is None):
        raise ValueError("give either sparsity or pattern")
    if pattern is not None:
        keep, group = check_pattern(pattern)
        check_divisible(scores.shape[-1], pattern)
        return _keep_groups(scores, keep, group)
    assert sparsity is not None
    check_sparsity(sparsity)
    rows = scores if scope == "row" else scores.reshape(1, -1)
    return _drop_lowest(rows, int(rows.shape[-1] * sparsity)).reshape(scores.shape)


def _keep_groups(scores: Tensor, keep: int, group: int) -> Tensor:
    if group > 8:
        return _drop_lowest(scores.reshape(-1, group), group - keep).reshape(scores.shape)
    columns = scores.reshape(-1, group).unbind(-1)
    # Each weight counts the neighbours that beat it; on a tie the higher index wins.
    beaten = [torch.zeros(columns[0].shape, dtype=torch.uint8, device=scores.device) for _ in columns]
    for low in range(group):
        for high in range(low + 1, group):
            high_wins = columns[high] >= columns[low]
            beaten[low] += high_wins
            beaten[high] += ~high_wins
    return torch.stack([count < keep for count in beaten], dim=-1).reshape(scores.shape)


def _drop_lowest(rows: Tensor, drop: int) -> Tensor:
    if drop == 0:
        return torch.ones_like(rows, dtype=torch.bool)
    if rows.device.type != "cpu":
        threshold = rows.kthvalue(drop, dim=-1).values
        return _keep_above(rows, threshold, drop)
    keep = torch.empty(rows.shape, dtype=torch.bool)
    step = max(1, CHUNK_ELEMENTS // rows.shape[-1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        # Partial selection; a full sort of the row costs 10 to 40 times as much.
        threshold = torch.from_numpy(np.partition(part.numpy(), drop - 1, axis=-1)[:, drop - 1].copy())
        keep[start : start + step] = _keep_above(part, threshold, drop)
    return keep


def _keep_above(rows: Tensor, threshold: Tensor, drop: int) -> Tensor:
    """Keep what exceeds each row's threshold, and of what equals it the highest indices, so that `drop` go."""
    keep = rows > threshold[:, None]
    kept_ties = rows.shape[-1] - drop - keep.sum(-1)
    for row in kept_ties.nonzero()[:, 0].tolist():
        ties = (rows[row] == threshold[row]).nonzero()[:, 0]
        keep[row, ties[len(ties) - int(kept_ties[row]) :]] = True
    return keep
