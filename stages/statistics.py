"""Sums over a layer's calibration inputs, kept while the inputs stream by. stages/README.md §1.

Letters: S = samples in this call, T = tokens of a sample, C = chunks of a sample's tokens, I = input channels,
O = output channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from espalier.stages.devices import bfloat16_factors
from espalier.stages.errors import Refusal

CPU_CHUNK = 1 << 18  # elements converted to float32 at a time, so that a chunk stays in the cache
PIVOT_TOKENS = 32  # tokens whose mean the sums are taken around
GRAM_TOKENS = 512  # tokens of a sample multiplied at a time: enough for a full-speed product
GRAM_ROWS = 512  # rows of the gram computed at a time, up to their diagonal


@dataclass(frozen=True, slots=True, eq=False)
class Check:
    """What one update is to have summed: Σx² of its samples, (S, C) by what they are of, from sample `first` on."""

    first: int
    squares: dict[str, Tensor]

    def finite(self) -> Tensor:
        """Whether no sample holds a NaN or an infinity, (), where the sums lie."""
        return torch.stack([torch.isfinite(squares_SC.sum(-1)) for squares_SC in self.squares.values()]).all()

    def refuse(self) -> None:
        """Raises Refusal for the first sample that does."""
        for of_what, squares_SC in self.squares.items():
            bad = (~torch.isfinite(squares_SC)).nonzero()
            if len(bad):
                sample, channel = bad[0].tolist()
                raise Refusal(
                    f"sample {self.first + sample}: NaN or infinity in its {of_what}, first in channel {channel}"
                )


def first_not_finite(checks: Sequence[Check]) -> Check | None:
    """The first of the checks that does not hold. The host waits once, if they all do."""
    if not checks or bool(torch.stack([check.finite() for check in checks]).all()):
        return None
    return next(check for check in checks if not bool(check.finite()))


class InputStatistics:
    """Per-channel sums of one input tensor, shared by every linear that reads it.

    Attributes (all float64, shape (I,)): `sum` Σx, `sum_sq` Σx², `weighted_variance` Σ over samples of
    tokens · the biased variance within that sample. Counts: `tokens`, `samples` (sequences).
    `gram` Σ x xᵀ (I, I) float32, only with `hessian=True`. `cross` Σ x̃ xᵀ (I, I) float32, only after `update_cross`:
    x̃ the inputs counted, x what the dense model has in their place. `output_sum_sq` Σy² (O,) float64 of the outputs
    of one linear that reads the input, only with `out_features`.

    Sums add: two disjoint sets of samples, merged, equal one pass over both up to rounding. How samples are cut into
    updates changes no bit.
    """

    def __init__(
        self,
        in_features: int,
        hessian: bool = False,
        out_features: int | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.in_features = in_features
        self.tokens = 0
        self.samples = 0
        self.sum = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.sum_sq = torch.zeros_like(self.sum)
        self.weighted_variance = torch.zeros_like(self.sum)
        self.output_sum_sq: Tensor | None = None
        if out_features is not None:
            self.output_sum_sq = torch.zeros(out_features, dtype=torch.float64, device=device)
        self._gram = torch.zeros(in_features, in_features, device=device) if hessian else None
        self.cross: Tensor | None = None
        self._factors: dict[float, Tensor] = {}  # by damping, until another sample is added
        self._mirrored = True  # False: only the lower triangle of _gram holds the sums

    @property
    def gram(self) -> Tensor | None:
        """Σ x xᵀ, (I, I) float32, exactly symmetric; None without `hessian=True`. Not to be written to."""
        if self._gram is not None and not self._mirrored:
            _mirror_lower(self._gram)
            self._mirrored = True
        return self._gram

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
        gram = self.gram
        if gram is None:
            raise ValueError("these statistics were made without hessian=True")
        return gram * (2.0 / max(self.samples, 1))

    def inverse_factor(self, damping: float = 0.01) -> Tensor:
        """The upper Cholesky factor of H⁻¹ (see `espalier.stages.sparsegpt.inverse_factor`), factored once for all
        linears that read this input. Raises ValueError without `hessian=True`."""
        from espalier.stages.sparsegpt import inverse_factor

        if damping not in self._factors:
            self._factors[damping] = inverse_factor(self.hessian, damping)
        return self._factors[damping]

    def output_norm(self, weight: Tensor) -> Tensor:
        """‖Y_i‖₂ of Y = X Wᵀ over all tokens, (O,) float32, on the weight's device.

        From the outputs seen if they were counted, else as the root of the diagonal of W G Wᵀ, where a bias, if there
        is one, is left out. Raises ValueError if neither was kept.
        """
        if self.output_sum_sq is not None:
            if len(self.output_sum_sq) != len(weight):
                raise ValueError(f"outputs of {len(self.output_sum_sq)} channels were counted, not {len(weight)}")
            return self.output_sum_sq.sqrt().float().to(weight.device)
        gram = self.gram
        if gram is None:
            raise ValueError("output norms need statistics made with out_features=... or hessian=True")
        gram = gram.to(weight.device)
        norms = []
        for part in weight.detach().split(max(1, CPU_CHUNK // self.in_features)):
            part_RI = part.float()
            norms.append((part_RI @ gram).mul_(part_RI).sum(-1).clamp_(min=0).sqrt_())
        return torch.cat(norms)

    def update(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add inputs x (samples, tokens, I) of any floating dtype; (tokens, I) counts as one sample.

        y (samples, tokens, O): what the linear made of x; needed if, and only if, `out_features` was given.
        Raises Refusal if a sample holds a NaN or an infinity, naming the sample by its place in the stream, and adds
        nothing then. The host waits once.
        """
        self._add(x, y, at_once=True)

    def update_unchecked(self, x: Tensor, y: Tensor | None = None) -> Check | None:
        """The same, but that the host does not wait: a check comes back, to be asked before the sums are used."""
        return self._add(x, y, at_once=False)

    def update_cross(self, x: Tensor, dense: Tensor) -> None:
        """Add Σ x̃ xᵀ of inputs x̃, which `update` is given too, and `dense`, x, the dense model's in the same places."""
        x_STI, dense_STI = (each.detach().reshape(-1, *each.shape[-2:]) for each in (x, dense))
        if x_STI.shape != dense_STI.shape or x_STI.shape[-1] != self.in_features:
            raise ValueError(f"inputs {tuple(x.shape)} beside the dense model's {tuple(dense.shape)}")
        if self.cross is None:
            self.cross = torch.zeros(self.in_features, self.in_features, device=x.device)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            _add_cross_gram(self.cross, x_STI, dense_STI)

    def _add(self, x: Tensor, y: Tensor | None, at_once: bool) -> Check | None:
        self._factors.clear()
        x_STI = x.detach().reshape(-1, *x.shape[-2:])
        samples, tokens, channels = x_STI.shape
        if channels != self.in_features:
            raise ValueError(f"inputs have {channels} channels, these statistics {self.in_features}")
        y_STO = self._outputs(y, samples, tokens)
        if not samples or not tokens:
            return None
        with torch.no_grad(), torch.autocast(x_STI.device.type, enabled=False):
            pivot_SI, first_SI, second_SI = self._centred_sums(x_STI)
            outputs_SO = _sums_of_squares(y_STO) if y_STO is not None else None
        pivot_SI = pivot_SI.double()
        deviation_SI = second_SI - first_SI.square() / tokens  # Σ(x − mean)²: no digits cancel, the pivot is near
        total_SI = first_SI + tokens * pivot_SI
        squares_SI = deviation_SI + total_SI.square() / tokens
        check = Check(self.samples, {"inputs": squares_SI} | ({} if outputs_SO is None else {"outputs": outputs_SO}))
        if at_once and not bool(check.finite()):
            check.refuse()
        if outputs_SO is not None and self.output_sum_sq is not None:
            for squares_O in outputs_SO:
                self.output_sum_sq += squares_O
        for total_I, squares_I, deviation_I in zip(total_SI, squares_SI, deviation_SI, strict=True):
            self.sum += total_I
            self.sum_sq += squares_I
            self.weighted_variance += deviation_I.clamp_(min=0)  # tokens · (deviation / tokens)
        if self._gram is not None:
            with torch.no_grad(), torch.autocast(x_STI.device.type, enabled=False):
                _add_lower_gram(self._gram, x_STI)
            self._mirrored = False
        self.samples += samples
        self.tokens += samples * tokens
        return check

    def _outputs(self, y: Tensor | None, samples: int, tokens: int) -> Tensor | None:
        """y as (samples, tokens, O), checked against what these statistics keep."""
        if y is None or self.output_sum_sq is None:
            if y is not None or self.output_sum_sq is not None:
                raise ValueError("update() takes outputs y if, and only if, the statistics were made with out_features")
            return None
        expected = (samples, tokens, len(self.output_sum_sq))
        y_STO = y.detach().reshape(-1, *y.shape[-2:])
        if y_STO.shape != expected:
            raise ValueError(f"outputs are {tuple(y_STO.shape)}, these statistics expect {expected}")
        return y_STO

    def _centred_sums(self, x_STI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A pivot near the mean, float32, Σ(x − pivot) and Σ(x − pivot)², float64, each (S, I): summed in float32
        within a chunk of tokens, in float64 between chunks.

        A sum in MKL may depend on how its operands lie in memory. Here they lie in space of this call's own, which
        torch aligns, each chunk and each result at its start: a sample's sums do not hang on its place among others.
        """
        samples, _, channels = x_STI.shape
        chunk = _chunk_tokens(x_STI)
        pivot_SI = torch.empty(samples, channels, device=x_STI.device)
        first_SI = torch.zeros(samples, channels, dtype=torch.float64, device=x_STI.device)
        second_SI = torch.zeros_like(first_SI)
        space_TI = torch.empty(chunk, channels, device=x_STI.device)
        ones_T = torch.ones(1, chunk, device=x_STI.device)
        sums_1I = torch.empty(1, channels, device=x_STI.device)
        for sample, sample_TI in enumerate(x_STI):
            for position, part_TI in enumerate(sample_TI.split(chunk)):
                x_TI, ones = space_TI[: len(part_TI)], ones_T[:, : len(part_TI)]
                x_TI.copy_(part_TI)
                if not position:
                    near = min(PIVOT_TOKENS, len(x_TI))
                    pivot_SI[sample] = torch.mm(ones[:, :near], x_TI[:near], out=sums_1I)[0] / near
                x_TI.sub_(pivot_SI[sample])
                # Column sums as a matrix product: several times faster than sum(0).
                first_SI[sample] += torch.mm(ones, x_TI, out=sums_1I)[0]
                second_SI[sample] += torch.mm(ones, x_TI.mul_(x_TI), out=sums_1I)[0]
        return pivot_SI, first_SI, second_SI

    def merge(self, other: "InputStatistics") -> None:
        """Add the sums of `other`, gathered over other samples of the same input."""
        if self._keeps() != other._keeps():
            raise ValueError(
                f"cannot merge statistics of {other._keeps()} into {self._keeps()} (inputs, hessian, outputs, cross)"
            )
        self.tokens += other.tokens
        self.samples += other.samples
        self.sum += other.sum.to(self.sum.device)
        self.sum_sq += other.sum_sq.to(self.sum.device)
        self.weighted_variance += other.weighted_variance.to(self.sum.device)
        if self.output_sum_sq is not None and other.output_sum_sq is not None:
            self.output_sum_sq += other.output_sum_sq.to(self.sum.device)
        if self._gram is not None and other._gram is not None:
            self._gram += other._gram.to(self._gram.device)
            self._mirrored = False
        if self.cross is not None and other.cross is not None:
            self.cross += other.cross.to(self.cross.device)

    def _keeps(self) -> tuple[int, bool, int | None, bool]:
        outputs = None if self.output_sum_sq is None else len(self.output_sum_sq)
        return self.in_features, self._gram is not None, outputs, self.cross is not None


def _chunk_tokens(x_STC: Tensor) -> int:
    """Tokens summed in float32 at a time: on a CPU as many as stay in the cache."""
    tokens, channels = x_STC.shape[1:]
    return min(tokens, max(32, CPU_CHUNK // channels)) if x_STC.device.type == "cpu" else tokens


def _sums_of_squares(y_STO: Tensor) -> Tensor:
    """Σy² over each sample's tokens, (S, O) float64: float32 in a chunk, float64 between chunks."""
    samples, _, channels = y_STO.shape
    sums_SO = torch.zeros(samples, channels, dtype=torch.float64, device=y_STO.device)
    for sample, sample_TO in enumerate(y_STO):
        for part_TO in sample_TO.split(_chunk_tokens(y_STO)):
            ones_T = torch.ones(1, len(part_TO), device=y_STO.device)
            sums_SO[sample] += (ones_T @ part_TO.float().square())[0]
    return sums_SO


def _add_lower_gram(gram_II: Tensor, x_STI: Tensor) -> None:
    """Add Σ x xᵀ to the lower triangle of `gram_II`; what lies above it is left undefined.

    A sample at a time, so that no bit depends on how samples were batched, and a panel of rows at a time, each only up
    to its diagonal: nearly half the work of the whole square.

    bfloat16 inputs on a CPU: torch.mm of them is fast and accumulates in float32 but rounds its result to bfloat16,
    and `out_dtype` exists on CUDA only. oneDNN's bfloat16 mode for float32 products is the way to the same arithmetic
    with a float32 result; it rounds the factors to bfloat16, which these already are, so nothing is lost. On CUDA TF32
    does the same. Sums are in float32 either way, in another order: 1.4e-6 of the largest apart (512 x 1024, Zen 4).
    """
    with bfloat16_factors(x_STI.device, x_STI.dtype == torch.bfloat16):
        for sample_TI in x_STI:
            for part_TI in sample_TI.split(GRAM_TOKENS):
                # In memory of its own, which torch aligns: where a sample lies in its batch decides no bit.
                x_TI = part_TI.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
                for start in range(0, len(gram_II), GRAM_ROWS):
                    end = start + GRAM_ROWS
                    gram_II[start:end, :end].addmm_(x_TI[:, start:end].T, x_TI[:, :end])


def _add_cross_gram(cross_II: Tensor, x_STI: Tensor, dense_STI: Tensor) -> None:
    """Add Σ x̃ xᵀ to `cross_II`, in the same parts and arithmetic as `_add_lower_gram`."""
    with bfloat16_factors(x_STI.device, x_STI.dtype == dense_STI.dtype == torch.bfloat16):
        for pair in zip(x_STI, dense_STI, strict=True):
            for parts in zip(*(each_TI.split(GRAM_TOKENS) for each_TI in pair), strict=True):
                x_TI, dense_TI = (
                    part_TI.to(torch.float32, memory_format=torch.contiguous_format, copy=True) for part_TI in parts
                )
                cross_II.addmm_(x_TI.T, dense_TI)


def _mirror_lower(gram_II: Tensor) -> None:
    """Write the lower triangle over the upper one, in place."""
    for start in range(0, len(gram_II), GRAM_ROWS):
        end = start + GRAM_ROWS
        gram_II[:start, start:end] = gram_II[start:end, :start].T
        diagonal = gram_II[start:end, start:end]
        diagonal.copy_(diagonal.tril() + diagonal.tril(-1).T)
