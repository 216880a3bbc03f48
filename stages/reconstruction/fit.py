"""A pruned unit fitted to what the dense unit gave on the same inputs. stages/README.md §6 (Free Lunch, 2510.14444).

Letters: S = samples of a batch, L = tokens of a sample, D = hidden size.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from espalier.stages.devices import deterministic
from espalier.stages.masks import masked
from espalier.stages.model.calls import Call
from espalier.stages.precision import cast_for_good, computing
from espalier.stages.reconstruction.target import Target
from espalier.stages.reconstruction.units import UnitModules
from espalier.stages.storage.spool import Spool
from espalier.stages.storage.staging import Make, prefetch, upload

WARM_UP = 0.1  # share of the steps over which the learning rate rises
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of AdamW
STEPPED_AT_A_TIME = 1 << 20  # weights
SHARES = (1.0, 0.5, 0.25)  # of the way to where training ended, tried until it helps no more to go back
VALIDATION = 8  # one sample in this many is held out to judge the fit


@dataclass(frozen=True, kw_only=True, slots=True)
class FitSettings:
    """How a unit is fitted."""

    tolerance: float = 0.0  # held-out error up to which the unit is left as it is
    epochs: int = 1
    batch: int = 2  # samples a step
    learning_rate: float = 0.4  # in units of `rate_unit`
    seed: int = 0
    dtype: torch.dtype = torch.float32  # of its products


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """What fitting one unit did. Errors are ‖f̃(x) − f(x)‖² / ‖f(x)‖² on the held-out samples."""

    error_before: float
    error_after: float
    improved: bool
    share: float  # of the way from the unit as it was to where its training ended
    steps: int
    learning_rate: float  # peak, absolute
    flops: float  # of all matrix products: fitting forward and backward, and the passes over the held-out samples


class _Masters:
    """AdamW on float32 masters, stepped inside the backward pass.

    A weight's step runs as soon as its gradient is complete and frees the gradient, so no more than one matrix's
    gradient lives at a time: 14 bytes a parameter with bf16 working weights, 16 with float32 ones. A step takes
    a stretch of its weight at a time, so that a whole matrix never has a float32 gradient.
    """

    def __init__(
        self, working: Mapping[str, nn.Parameter], keep: Mapping[str, Tensor], masters: Mapping[str, Tensor]
    ) -> None:
        self.learning_rate = 0.0
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._stepper(masters[name], keep.get(name)))
            for name, parameter in working.items()
        ]

    def _stepper(self, master: Tensor, keep: Tensor | None) -> Callable[[Tensor], None]:
        size = STEPPED_AT_A_TIME if master.device.type == "cpu" else master.numel()
        flat = master.view(-1)
        parts = [slice(start, min(start + size, len(flat))) for start in range(0, len(flat), size)]
        first, second = torch.zeros_like(flat), torch.zeros_like(flat)
        kept = None if keep is None else keep.reshape(-1)
        steps = torch.zeros((), device=master.device)

        def step(parameter: Tensor) -> None:
            gradient, weight = parameter.grad, parameter.detach().view(-1)
            assert gradient is not None
            parameter.grad = None
            gradient = gradient.reshape(-1)
            for part in parts:
                # Zero weight, zero gradient, no decay: a pruned weight stays exactly zero.
                rough = gradient[part] if kept is None else masked(gradient[part], kept[part])
                adamw(
                    [flat[part]],
                    [rough.float()],
                    [first[part]],
                    [second[part]],
                    [],
                    [steps.clone()],  # it counts up; the parts of one weight are at the same step
                    fused=True,
                    amsgrad=False,
                    beta1=BETAS[0],
                    beta2=BETAS[1],
                    lr=self.learning_rate,
                    weight_decay=0.0,
                    eps=EPSILON,
                    maximize=False,
                )
                weight[part] = flat[part]
            steps.add_(1)

        return step

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def rate_unit(weights: Sequence[tuple[float, int]], width: int) -> float:
    """The RMS of a unit's weights over √width: a learning rate counted in it carries over from width to width.

    `weights`: the RMS of each of its matrices, and how many weights that is.

    AdamW moves each weight by about its learning rate, all of a row's in step with its error, so a row's output
    moves in proportion to width · rate and stands in proportion to √width · RMS. Best rates seen, as shares of the
    RMS: 0.07 at width 64, 0.045 at 256, 0.008 at 1024 (tests/benchmarks/README.md).
    """
    mean_square = sum(rms**2 * count for rms, count in weights) / sum(count for _, count in weights)
    return (mean_square / width) ** 0.5


def weight_rms(weight: Tensor) -> float:
    """Root mean square of a tensor."""
    squares = torch.zeros((), dtype=torch.float64, device=weight.device)  # there: the host waits once
    for part in weight.detach().reshape(-1).split(STEPPED_AT_A_TIME // 8):
        values = part.float()
        squares += values.dot(values)
    return (float(squares) / max(weight.numel(), 1)) ** 0.5


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first tenth of the steps, then a linear decay that would reach zero one step later."""
    warm = max(1, round(steps * WARM_UP))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (steps - step) / max(steps - warm, 1)


def split_samples(samples: int) -> tuple[list[int], list[int]]:
    """Sample numbers to fit on, and the held-out eighth (at least one; a single sample serves as both)."""
    held = list(range(VALIDATION - 1, samples, VALIDATION)) or [samples - 1]
    fitted = [index for index in range(samples) if index not in set(held)] or held
    return fitted, held


@torch.no_grad()
def relative_error(
    unit: UnitModules, calls: Sequence[Call], inputs: Spool, targets: Target, samples: list[int]
) -> float:
    """‖f̃(x) − f(x)‖² / ‖f(x)‖² over the given samples, one sample at a time, summed in float64."""
    device = next(unit.parameters()).device
    error = torch.zeros((), dtype=torch.float64, device=device)  # there: the host waits once
    total = torch.zeros_like(error)
    made: Iterator[list[Make]] = ([functools.partial(targets.batch, [index]), _one(inputs, index)] for index in samples)
    with computing(unit):
        for index, (wanted, given) in zip(samples, prefetch(made, device), strict=True):
            target = wanted()[0].float()
            output = unit(given(), [call.at([index]) for call in calls])[0].float()
            error += (output - target).square().sum(dtype=torch.float64)
            total += target.square().sum(dtype=torch.float64)
    apart, of = torch.stack([error, total]).tolist()
    return apart / of if of else apart


def _one(spool: Spool, index: int) -> Make:
    """Makes a batch of that sample alone: itself."""
    return lambda room: spool[index][None]


def _cpu_attention_flops(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], dropout: float = 0.0, causal: bool = False,
    *rest: Any, out_shape: Any = None, **named: Any,
) -> int:  # fmt: skip
    full = sdpa_flop_count(query, key, value)
    return full // 2 if causal else full  # the kernel skips what lies above the diagonal


@torch.no_grad()
def forward_flops(unit: UnitModules, calls: Sequence[Call], sample: Tensor) -> int:
    """FLOPs of the matrix products, attention's included, in one forward pass over one sample (L, D)."""
    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops}
    with computing(unit), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        unit(upload(sample, next(unit.parameters()).device)[None], calls)
    return counter.get_total_flops()


def fit(
    unit: UnitModules,
    keep: Mapping[str, Tensor],
    calls: Sequence[Call],
    inputs: Spool,
    targets: Target,
    settings: FitSettings,
    rate_unit: float,
) -> tuple[dict[str, Tensor], Fit]:
    """The unit's parameters after fitting, by `block.name`, and what the fit did.

    `unit` holds the pruned weights and is left as it was; `keep` has a mask for each pruned weight; `calls` are how its
    modules are called for one sample (`at` says how for others); `rate_unit` is what learning rates are counted in (see
    there).
    Minimises the mean squared error of the unit's output against `targets` over the kept weights, the biases and
    the norm gains: AdamW without weight decay on float32 masters, products in the settings' dtype. Errors are those of
    the weights as they are stored.
    Taken is where the held-out error is least: at the end of the training, or half or a quarter of the way there, for
    a start that is nearly the best there is loses more to the noise of the steps than it gains by them.
    With a tolerance a unit whose held-out error is at most that is left as it is, in no step.
    If the held-out error did not fall, or a weight outgrew the dtype that it is stored in, the parameters come back as
    they were.
    """
    fitted, held = split_samples(len(inputs))

    def error_of(there: UnitModules) -> float:
        return relative_error(there, calls, inputs, targets, held)

    before = error_of(unit)
    after, share, chosen, passes, steps = before, 0.0, unit, len(held), 0
    peak = settings.learning_rate * rate_unit
    if before > settings.tolerance or not settings.tolerance:
        with deterministic():
            masters = _train(unit, keep, calls, inputs, targets, settings, peak, fitted)
        tried = _on_the_way(unit, masters, keep, error_of)
        best = min(tried, key=lambda one: one[0])
        if best[0] < before:
            after, share, chosen = best
        passes += 3 * len(fitted) * settings.epochs + len(tried) * len(held)  # a backward pass costs two forward
        steps = _steps(len(fitted), settings)
    report = Fit(
        error_before=before,
        error_after=after,
        improved=share > 0,
        share=share,
        steps=steps,
        learning_rate=peak,
        flops=float(passes * forward_flops(unit, [call.at(held[:1]) for call in calls], inputs[held[0]])),
    )
    return {name: parameter.detach() for name, parameter in chosen.named().items()}, report


def _on_the_way(
    unit: UnitModules,
    masters: Mapping[str, Tensor],
    keep: Mapping[str, Tensor],
    error_of: Callable[[UnitModules], float],
) -> list[tuple[float, float, UnitModules]]:
    """(error, share, the unit that share of the way to `masters`) for each of SHARES until going back helps no more.

    In the unit's own dtypes; zeros stay exactly zero. Infinite is the error of what is not finite.
    """
    tried: list[tuple[float, float, UnitModules]] = []
    for share in SHARES:
        there = copy.deepcopy(unit)
        with torch.no_grad():
            for name, parameter in there.named().items():
                moved = masters[name] if share == 1 else torch.lerp(parameter.float(), masters[name], share)
                parameter.copy_(moved if name not in keep else moved * keep[name])
        error = error_of(there) if _finite(there) else math.inf
        tried.append((error if error < math.inf else math.inf, share, there))  # of nan, too
        if tried[-1][0] > tried[0][0]:
            break
    return tried


def _finite(unit: UnitModules) -> bool:
    sums = [parameter.sum(dtype=torch.float32) for parameter in unit.parameters()]
    return not sums or bool(torch.isfinite(torch.stack(sums)).all())


def _steps(samples: int, settings: FitSettings) -> int:
    return settings.epochs * -(-samples // settings.batch)


def _minibatches(samples: list[int], settings: FitSettings) -> list[list[int]]:
    """The samples of each step, all epochs one after the other."""
    generator = torch.Generator().manual_seed(settings.seed)
    batches: list[list[int]] = []
    for _ in range(settings.epochs):
        order = [samples[i] for i in torch.randperm(len(samples), generator=generator).tolist()]
        batches += [order[start : start + settings.batch] for start in range(0, len(order), settings.batch)]
    return batches


def _train(
    unit: UnitModules,
    keep: Mapping[str, Tensor],
    calls: Sequence[Call],
    inputs: Spool,
    targets: Target,
    settings: FitSettings,
    peak: float,
    samples: list[int],
) -> dict[str, Tensor]:
    """The float32 masters after all steps, by name."""
    device, dtype = next(unit.parameters()).device, settings.dtype
    calls = [call.to(dtype) for call in calls]
    working = copy.deepcopy(unit).requires_grad_(False)
    cast_for_good(working, dtype)
    for parameter in working.named().values():
        parameter.requires_grad_(True)
    masters = {name: parameter.detach().float().clone() for name, parameter in unit.named().items()}
    state = _Masters(working.named(), keep, masters)
    first_targets = targets.batch(samples[: settings.batch]).float()
    scale = 1.0 / max(float(first_targets.square().mean()), 1e-30)  # a relative error, whatever the activations' units
    steps = _steps(len(samples), settings)
    batches = _minibatches(samples, settings)
    made = ([functools.partial(inputs.batch, batch), functools.partial(targets.batch, batch)] for batch in batches)
    for step, (batch, (given, wanted)) in enumerate(zip(batches, prefetch(made, device), strict=True)):
        state.learning_rate = learning_rate_at(step, steps, peak)
        output = working(given().to(dtype=dtype), [call.at(batch) for call in calls])
        # The gradient of scale · mean squared error, written out: one pass, and no float32 copies of the batch.
        residual = output.detach() - wanted()
        output.backward(residual.mul_(2 * scale / residual.numel()).to(dtype))
    state.close()
    return masters
