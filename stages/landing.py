"""Thresholds in units of a matrix's own spread of scores that remove a wanted share of all weights together."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

SHIFT = 11  # bits of a float32 that are let go: scores are told apart to 0.1 % of their size
BINS = 1 << (31 - SHIFT)  # of what is left, without the sign
CHUNK = 1 << 22


def landing_rates(scores: Iterable[Tensor], shares: Sequence[float]) -> list[float]:
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
