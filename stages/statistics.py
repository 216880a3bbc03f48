"""Sums over a layer's calibration inputs, kept while the inputs stream by. Methods §1.

Letters: T = calibration tokens in this call, I = input channels.
"""

import torch
from torch import Tensor

from stages.errors import Refusal

CPU_CHUNK = 1 << 17  # elements converted to float32 at a time, so that a chunk stays in the cache


class InputStatistics:
    """Per-channel sums of one input tensor, shared by every linear that reads it.

    Attributes (all float64, shape (I,)): `sum` Σx, `sum_sq` Σx², `weighted_variance` Σ over samples of
    tokens · the biased variance within that sample. Counts: `tokens`, `samples` (sequences).
    `gram` Σ x xᵀ (I, I) float32, only with `hessian=True`.

    Sums add: two disjoint sets of samples, merged, equal one pass over both up to rounding.
    """

    def __init__(self, in_features: int, hessian: bool = False, device: str | torch.device = "cpu") -> None:
        self.in_features = in_features
        self.tokens = 0
        self.samples = 0
        self.sum = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.sum_sq = torch.zeros_like(self.sum)
        self.weighted_variance = torch.zeros_like(self.sum)
        self.gram = torch.zeros(in_features, in_features, device=device) if hessian else None

    @property
    def norm(self) -> Tensor:
        """‖X_j‖₂ over all tokens, (I,) float32."""
        return self.sum_sq.sqrt().float()

    @property
    def mean_per_sample(self) -> Tensor:
        """Σx / samples, (I,) float32: a sum over a sample's tokens, averaged over samples (DSnoT's E[X])."""
        return (self.sum / max(self.samples, 1)).float()

    @property
    def variance(self) -> Tensor:
        """Token-weighted mean over samples of the biased within-sample variance, (I,) float32 (DSnoT's Var)."""
        return (self.weighted_variance / max(self.tokens, 1)).float()

    @property
    def hessian(self) -> Tensor:
        """H = 2/samples · Σ x xᵀ, (I, I) float32 (SparseGPT). Raises ValueError if it was not asked for."""
        if self.gram is None:
            raise ValueError("these statistics were made without hessian=True")
        return self.gram * (2.0 / max(self.samples, 1))

    def update(self, x: Tensor) -> None:
        """Add inputs x (samples, tokens, I) of any floating dtype; (tokens, I) counts as one sample.

        Raises Refusal if a sample holds a NaN or an infinity, naming the sample by its place in the stream.
        """
        x = x.detach().reshape(-1, *x.shape[-2:])
        if x.shape[-1] != self.in_features:
            raise ValueError(f"inputs have {x.shape[-1]} channels, these statistics {self.in_features}")
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            for sample_TI in x:
                self._add_sample(sample_TI)

    def _add_sample(self, sample_TI: Tensor) -> None:
        tokens = len(sample_TI)
        chunk = max(32, CPU_CHUNK // self.in_features) if sample_TI.device.type == "cpu" else tokens
        total, squares = torch.zeros_like(self.sum), torch.zeros_like(self.sum)
        mean = torch.zeros_like(self.sum)
        deviation, done = torch.zeros_like(self.sum), 0  # Σ(x − mean)², tokens so far: Chan et al.'s update
        for part_TI in sample_TI.split(chunk):
            x_TI = part_TI.float()
            if self.gram is not None:
                self.gram.addmm_(x_TI.T, x_TI)
            ones = x_TI.new_ones(1, len(x_TI))  # column sums as a matrix product: several times faster than sum(0)
            part_sum = (ones @ x_TI)[0]
            part_mean = part_sum / len(x_TI)
            centred = x_TI - part_mean if x_TI.data_ptr() == part_TI.data_ptr() else x_TI.sub_(part_mean)
            part_deviation = (ones @ centred.square_())[0].double()
            part_mean64 = part_mean.double()
            delta = part_mean64 - mean
            both = done + len(x_TI)
            deviation += part_deviation + delta.square() * (done * len(x_TI) / both)
            mean += delta * (len(x_TI) / both)
            squares += part_deviation + part_mean64 * (2 * part_sum.double() - len(x_TI) * part_mean64)
            total += part_sum
            done = both
        if not torch.isfinite(squares.sum()):
            channel = int((~torch.isfinite(squares)).nonzero()[0])
            raise Refusal(f"sample {self.samples}: NaN or infinity in its inputs, first in channel {channel}")
        self.sum += total
        self.sum_sq += squares
        self.weighted_variance += deviation  # tokens · (deviation / tokens)
        self.samples += 1
        self.tokens += tokens

    def merge(self, other: "InputStatistics") -> None:
        """Add the sums of `other`, gathered over other samples of the same input."""
        if (self.in_features, self.gram is None) != (other.in_features, other.gram is None):
            raise ValueError(f"cannot merge statistics of {other.in_features} channels into {self.in_features}")
        self.tokens += other.tokens
        self.samples += other.samples
        self.sum += other.sum.to(self.sum.device)
        self.sum_sq += other.sum_sq.to(self.sum.device)
        self.weighted_variance += other.weighted_variance.to(self.sum.device)
        if self.gram is not None and other.gram is not None:
            self.gram += other.gram.to(self.gram.device)
