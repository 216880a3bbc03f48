"""Keep masks from scores. A mask is always `keep`: True = the weight survives. stages/README.md §3.

Letters: O = output rows, I = input columns, G = groups of M neighbours along the inputs.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from espalier.stages.errors import Refusal

Scope = Literal["row", "matrix"]
CHUNK_ELEMENTS = 1 << 17  # scores worked on at a time, so that the copies stay in the cache
SAMPLED = 1 << 14  # of a longer row's scores, to find where its threshold lies
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
SHIFT = 11  # bits of a float32 that thresholds let go: scores are told apart to 0.1 % of their size
BINS = 1 << (31 - SHIFT)  # of what is left, without the sign
CHUNK = 1 << 22  # scores counted at a time
WORDS = {size: np.dtype(f"<u{size}") for size in (2, 4, 8)}  # one byte for each weight of a group


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


def check_threshold(rate: float) -> float:
    """The rate itself. Raises Refusal unless it is finite and at least 0."""
    if not 0 <= rate < float("inf"):
        raise Refusal(f"threshold {rate}: standard deviations of a matrix's scores, a number of at least 0; try 1")
    return rate


def parse_pattern(text: str) -> tuple[int, int]:
    """`2:4` as (2, 4). Raises Refusal for anything else."""
    parts = text.split(":")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise Refusal(f"pattern {text!r}: write N:M, such as 2:4 (keep 2 of every 4)")
    return check_pattern((int(parts[0]), int(parts[1])))


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
    threshold: float | None = None,
) -> Tensor:
    """Bool (O, I), True = keep, from scores (O, I): the lowest go, and among equals the lower index goes first.

    `sparsity` s removes exactly int(I · s) of each row, or int(O · I · s) of the matrix with `scope="matrix"`.
    `pattern` (N, M) keeps exactly N of every M consecutive inputs.
    `threshold` keeps what is above so many standard deviations of the matrix's scores, few or many.
    Give one of the three. Raises Refusal for a ratio outside [0, 1), N > M, N < 1, rows that groups of M do not fill,
    or a threshold below 0.
    """
    if [sparsity, pattern, threshold].count(None) != 2:
        raise ValueError("give one of sparsity, pattern and threshold")
    if threshold is not None:
        return scores > check_threshold(threshold) * scores.std(correction=0)
    if pattern is not None:
        keep, group = check_pattern(pattern)
        check_divisible(scores.shape[-1], pattern)
        return _keep_groups(scores, keep, group)
    assert sparsity is not None
    check_sparsity(sparsity)
    rows = scores if scope == "row" else scores.reshape(1, -1)
    return _drop_lowest(rows, int(rows.shape[-1] * sparsity)).reshape(scores.shape)


def masked(weight: Tensor, keep: Tensor) -> Tensor:
    """The weight where `keep` is True and +0 elsewhere, in memory of its own."""
    bits = BITS[weight.dtype]  # as integers: no -0 from a negative weight, and ten times as fast as masked_fill
    return (weight.view(bits) * keep).view(weight.dtype)


def count_zeros(weight: Tensor) -> int:
    """How many weights are zero, of either sign."""
    if weight.device.type != "cpu":
        return int((weight == 0).sum())
    zeros = 0
    for part in weight.detach().reshape(-1).split(CHUNK_ELEMENTS):
        bits = part.view(BITS[part.dtype]).numpy()
        zeros += bits.size - int(np.count_nonzero(bits << 1))  # the shift drops the sign
    return zeros


def _sortable(scores: Tensor) -> np.ndarray:
    """Integers in the order of the scores: those select and compare twice as fast as floats."""
    bits: np.ndarray = scores.view(BITS[scores.dtype]).numpy()
    if bits.min() >= 0:
        return bits
    bits = (scores + 0.0).view(BITS[scores.dtype]).numpy()  # -0 + 0 = +0, so that the two zeros are equal
    return bits ^ ((bits >> (8 * bits.itemsize - 1)) & np.iinfo(bits.dtype).max)


def _keep_groups(scores: Tensor, keep: int, group: int) -> Tensor:
    if scores.device.type != "cpu" and group <= 8:
        return _keep_stronger(scores.reshape(-1, group).unbind(-1), keep).reshape(scores.shape)
    if group not in WORDS:
        return _drop_lowest(scores.reshape(-1, group), group - keep).reshape(scores.shape)
    flat = scores.reshape(-1)
    mask = torch.empty(flat.shape, dtype=torch.bool)
    for start in range(0, len(flat), CHUNK_ELEMENTS):
        part = flat[start : start + CHUNK_ELEMENTS]
        # numpy compares float32 twice as fast as integers, but has no bfloat16, and is slow in float16
        beaten = _beaten(part.numpy() if part.dtype in (torch.float32, torch.float64) else _sortable(part), group)
        np.less(beaten, keep, out=mask[start : start + CHUNK_ELEMENTS].numpy())
    return mask.reshape(scores.shape)


def _keep_stronger(columns: Sequence[Tensor], keep: int) -> Tensor:
    """Each weight counts the neighbours that beat it; on a tie the higher index wins."""
    beaten = [torch.zeros(columns[0].shape, dtype=torch.uint8, device=columns[0].device) for _ in columns]
    for low in range(len(columns)):
        for high in range(low + 1, len(columns)):
            high_wins = columns[high] >= columns[low]
            beaten[low] += high_wins
            beaten[high] += ~high_wins
    return torch.stack([count < keep for count in beaten], dim=-1)


def _beaten(keys: np.ndarray, group: int) -> np.ndarray:
    """How many of its neighbours in the group beat each key, uint8; on a tie the higher index wins.

    A group's counts are the bytes of one word. All keys are compared with those d places on, contiguously, and what
    reached into the next group is masked out; taking the columns apart and putting them together costs three times
    as much. Where the higher wins, the byte of the lower counts one more, and that of the higher, which starts as
    beaten by all before it, one less: 1 - 256^d, a borrow or carry from byte to byte being undone by those that follow.
    """
    word = WORDS[group]
    counts = np.full(keys.size // group, int.from_bytes(bytes(range(group)), "little"), dtype=word)
    wins = np.zeros(keys.size, dtype=np.bool_)
    words = wins.view(word)
    high_wins = np.empty_like(counts)
    for distance in range(1, group):
        np.greater_equal(keys[distance:], keys[:-distance], out=wins[:-distance])
        inside = word.type(int.from_bytes(bytes([1] * (group - distance)), "little"))
        np.bitwise_and(words, inside, out=high_wins)
        np.multiply(high_wins, word.type(256**distance - 1), out=high_wins)
        np.subtract(counts, high_wins, out=counts)
    return counts.view(np.uint8)


def _drop_lowest(rows: Tensor, drop: int) -> Tensor:
    if drop == 0:
        return torch.ones_like(rows, dtype=torch.bool)
    if rows.device.type != "cpu":
        return _drop_lowest_on_device(rows.contiguous(), drop)
    columns = rows.shape[-1]
    if columns > CHUNK_ELEMENTS:
        return torch.stack([_drop_lowest_of_long(row, drop) for row in rows])
    keep = torch.empty(rows.shape, dtype=torch.bool)
    step = max(1, CHUNK_ELEMENTS // columns)
    for start in range(0, len(rows), step):
        keys = _sortable(rows[start : start + step])
        # Partial selection; a full sort of the row costs 10 to 40 times as much.
        parted = np.partition(keys, drop - 1, axis=-1)
        last_O1, upper = parted[:, drop - 1 : drop], parted[:, drop:]
        part = keep[start : start + step]
        np.greater(keys, last_O1, out=part.numpy())
        if (upper.min(-1) == last_O1[:, 0]).any():  # survivors that equal the last to go: those with higher indices
            survivors = np.bincount(np.flatnonzero(upper == last_O1) // upper.shape[-1], minlength=len(keys))
            ties = torch.from_numpy(np.flatnonzero(keys == last_O1))
            part.view(-1)[_last_ties(ties, columns, torch.from_numpy(survivors))] = True
    return keep


def _drop_lowest_of_long(row: Tensor, drop: int) -> Tensor:
    """The same for one row, of a whole matrix, say, in a third of the time."""
    keys = _sortable(row)
    last = _nth_lowest(keys, drop)
    keep = torch.from_numpy(np.greater(keys, last))
    equal_survivors = len(keys) - drop - int(np.count_nonzero(keep.numpy()))
    if equal_survivors:
        keep[torch.from_numpy(np.flatnonzero(keys == last)[-equal_survivors:])] = True
    return keep


def _nth_lowest(keys: np.ndarray, nth: int) -> Any:
    """The nth lowest of the keys, from 1: two keys of a sample almost surely enclose it, and leave few to part."""
    sample = np.sort(keys[np.random.default_rng(0).integers(0, len(keys), SAMPLED)])
    place, margin = nth / len(keys) * SAMPLED, 2 * SAMPLED**0.5  # four standard deviations, at a half
    low, high = sample[max(0, int(place - margin))], sample[min(SAMPLED - 1, int(place + margin))]
    below, enclosed = 0, []
    for start in range(0, len(keys), CHUNK_ELEMENTS):
        part = keys[start : start + CHUNK_ELEMENTS]
        under = part < low
        below += int(np.count_nonzero(under))
        enclosed.append(part[~under & (part <= high)])
    candidates = np.concatenate(enclosed)
    if not below < nth <= below + len(candidates):  # the nth is among the sample's ends, or it was a rare sample
        return np.partition(keys, nth - 1)[nth - 1]
    return np.partition(candidates, nth - 1 - below)[nth - 1 - below]


def _drop_lowest_on_device(rows: Tensor, drop: int) -> Tensor:
    columns = rows.shape[-1]
    if len(rows) == 1:  # a whole matrix: CUDA's kthvalue gives a row to one block of threads, a sort uses them all
        last_O1 = rows.sort(dim=-1).values[:, drop - 1 : drop]
    else:
        last_O1 = rows.kthvalue(drop, dim=-1, keepdim=True).values
    keep, ties = rows > last_O1, rows == last_O1
    gone_O1 = ties.sum(-1, keepdim=True) - (columns - drop - keep.sum(-1, keepdim=True))  # of the ties, the first ones
    return keep.logical_or_(ties.cumsum(-1, dtype=torch.int32).gt(gone_O1).logical_and_(ties))  # nobody waits for it


def _last_ties(place_T: Tensor, columns: int, count_O: Tensor) -> Tensor:
    """Of ties at these places of a matrix with so many columns, in order, the last `count_O` of each row."""
    row_T = place_T // columns
    end_O = torch.bincount(row_T, minlength=len(count_O)).cumsum(0)
    left_T = end_O[row_T] - torch.arange(len(row_T), device=row_T.device)  # this one and those after it in its row
    return place_T[left_T <= count_O[row_T]]


def thresholds_for_sparsity(scores: Iterable[Tensor], shares: Sequence[float]) -> list[float]:
    """For each share s the rate r at which `score <= r * std(score)`, matrix by matrix, holds for s of all weights.

    One pass over the matrices of scores (>= 0); none is kept. A share of 0 gives 0. Exact to what lies between two of
    the bins, whose borders are the float32 numbers with 12 bits of mantissa: a twentieth of a per cent of the rate.
    Raises ValueError if there are no scores.
    """
    counts = np.zeros(BINS, dtype=np.int64)
    for matrix in scores:
        flat = matrix.detach().float().reshape(-1)
        spread = float(flat.std(correction=0))
        if spread > 0:
            flat = flat / spread
        for part in flat.split(CHUNK):
            counts += np.bincount(part.abs().numpy().view(np.int32) >> SHIFT, minlength=BINS)
    total = np.cumsum(counts)
    if not total[-1]:
        raise ValueError("no scores")
    # The smallest bin up to which there is at least that share; of it the largest number.
    bins = np.searchsorted(total, np.ceil(np.asarray(shares) * total[-1] - 1e-9))
    highest = ((bins.astype(np.int64) + 1) << SHIFT) - 1
    rates = torch.from_numpy(highest.astype(np.int32)).view(torch.float32).tolist()
    return [rate if share > 0 else 0.0 for rate, share in zip(rates, shares, strict=True)]
