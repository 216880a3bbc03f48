"""Which layer loses how much: outlier-weighted ratios of blocks (OWL), and a user's exceptions by name.
stages/README.md §3."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from espalier.stages.errors import Refusal
from espalier.stages.masks import check_sparsity


def outlier_share(scores: Callable[[], Iterable[Tensor]], m: float = 5.0) -> float:
    """The share of a block's scores above m times their mean (OWL, Yin et al. 2023, 2310.05175, Eq. 1: with Wanda's).

    `scores()` gives the scores of all prunable matrices of the block, part by part, and is called twice: for the mean,
    then to count. So no more than one part need be in memory. A block that has no scores, or only zeros, has none.
    """
    total, count = 0.0, 0
    for part in scores():
        total += float(part.sum(dtype=torch.float64))
        count += part.numel()
    if not count:
        return 0.0
    threshold = m * total / count
    return sum(int((part > threshold).sum()) for part in scores()) / count


def owl(
    shares: Sequence[float], sparsity: float, spread: float = 0.08, weights: Sequence[float] | None = None
) -> list[float]:
    """The sparsity of each block, in [s − λ, s + λ], from its outlier share: more outliers, fewer zeros.

    The mean over blocks, weighted by their counts of weights if those are given, is s exactly: the shares' distances
    from their mean are stretched until the largest is λ = `spread`. (The authors' code stretches them to a width of 2λ
    and then moves the mean to s, which can carry a block out of the interval.) Equal shares give s everywhere.
    Raises Refusal for a ratio outside [0, 1).
    """
    check_sparsity(sparsity)
    if not 0 <= spread < 1:
        raise Refusal(f"owl spread {spread}: must be at least 0 and below 1; try 0.08")
    counts = [1.0] * len(shares) if weights is None else list(weights)
    if len(counts) != len(shares):
        raise ValueError(f"{len(shares)} outlier shares, {len(counts)} counts of weights")
    mean = sum(share * count for share, count in zip(shares, counts, strict=True)) / sum(counts)
    distances = [mean - share for share in shares]
    largest = max(map(abs, distances))
    scale = spread / largest if largest > 1e-12 else 0.0  # what rounding leaves of equal shares is no distance
    ratios = [sparsity + scale * distance for distance in distances]
    ratios = [0.0 if abs(ratio) < 1e-12 else ratio for ratio in ratios]
    for block, ratio in enumerate(ratios):
        if not 0 <= ratio < 1:
            raise Refusal(
                f"owl: sparsity {sparsity} with a spread of {spread} takes block {block} to {ratio:.3f}, "
                f"and a ratio must be at least 0 and below 1; use a spread below {min(sparsity, 1 - sparsity):.3g}"
            )
    return ratios
