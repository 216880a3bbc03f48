"""Sums over a layer's calibration inputs, kept while the inputs stream by. Methods §1.

Letters: S = samples in this call, T = tokens of a sample, C = chunks of a sample's tokens, I = input channels.
"""

import torch
from torch import Tensor

from stages.errors import Refusal

CPU_CHUNK = 1 << 18  # elements converted to float32 at a time, so that a chunk stays in the cache
PIVOT_TOKENS = 32  # tokens whose mean the sums are taken around


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
        x_STI = x.detach().reshape(-1, *x.shape[-2:])
        samples, tokens, channels = x_STI.shape
        if channels != self.in_features:
            raise ValueError(f"inputs have {channels} channels, these statistics {self.in_features}")
        if not samples or not tokens:
            return
        with torch.no_grad(), torch.autocast(x_STI.device.type, enabled=False):
            pivot_SI = x_STI[:, :PIVOT_TOKENS].float().mean(1)
            first_SI, second_SI = self._centred_sums(x_STI, pivot_SI)
        pivot_SI = pivot_SI.double()
        deviation_SI = second_SI - first_SI.square() / tokens  # Σ(x − mean)²: no digits cancel, the pivot is near
        total_SI = first_SI + tokens * pivot_SI
        squares_SI = deviation_SI + total_SI.square() / tokens
        finite_S = torch.isfinite(squares_SI.sum(-1))
        if not finite_S.all():
            sample = int((~finite_S).nonzero()[0])
            channel = int((~torch.isfinite(squares_SI[sample])).nonzero()[0])
            raise Refusal(f"sample {self.samples + sample}: NaN or infinity in its inputs, first in channel {channel}")
        for total_I, squares_I, deviation_I in zip(total_SI, squares_SI, deviation_SI, strict=True):
            self.sum += total_I
            self.sum_sq += squares_I
            self.weighted_variance += deviation_I.clamp_(min=0)  # tokens · (deviation / tokens)
        self.samples += samples
        self.tokens += samples * tokens

    def _centred_sums(self, x_STI: Tensor, pivot_SI: Tensor) -> tuple[Tensor, Tensor]:
        """Σ(x − pivot) and Σ(x − pivot)² of each sample, (S, I) float64: float32 in a chunk, float64 between chunks."""
        samples, tokens, channels = x_STI.shape
        chunk = min(tokens, max(32, CPU_CHUNK // channels)) if x_STI.device.type == "cpu" else tokens
        chunks = -(-tokens // chunk)
        first_SCI = torch.empty(samples, chunks, channels, device=x_STI.device)
        second_SCI = torch.empty_like(first_SCI)
        space_TI = torch.empty(chunk, channels, device=x_STI.device)
        ones_T = torch.ones(1, chunk, device=x_STI.device)
        for sample, sample_TI in enumerate(x_STI):
            for position, part_TI in enumerate(sample_TI.split(chunk)):
                x_TI, ones = space_TI[: len(part_TI)], ones_T[:, : len(part_TI)]
                x_TI.copy_(part_TI)
                if self.gram is not None:
                    self.gram.addmm_(x_TI.T, x_TI)
                x_TI.sub_(pivot_SI[sample])
                # Column sums as a matrix product: several times faster than sum(0).
                torch.mm(ones, x_TI, out=first_SCI[sample, position : position + 1])
                torch.mm(ones, x_TI.mul_(x_TI), out=second_SCI[sample, position : position + 1])
        return first_SCI.sum(1, dtype=torch.float64), second_SCI.sum(1, dtype=torch.float64)

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
