"""Perplexity of a model on a text, and its KL divergence from the dense model and top-1 agreement with it.

Both are sums over the predicted tokens: every token but each window's first. Hidden states become logits a few
positions at a time, so that a large vocabulary costs no memory to speak of.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# S = samples, T = tokens of a window, P = positions, D = hidden size, V = vocabulary
HEAD_POSITIONS = 256  # positions turned into logits at a time: a vocabulary of 128 k costs 0.1 GB, not 1 GB
COMPARED_POSITIONS = 32  # of these, compared at a time: that takes half a dozen copies in float32 and float64

Head = Callable[[Tensor], Tensor]  # last block's output (1, P, D) -> logits (1, P, V)


def perplexity_of(loss: float) -> float:
    """exp(loss) for a loss in nats a token; infinite where that is beyond a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@dataclass(frozen=True, slots=True)
class Measures:
    """Sums over predicted tokens, which add up over microbatches."""

    tokens: int = 0
    nats: float = 0.0  # -log p of the tokens
    compared: int = 0  # tokens whose predictions were compared with the dense model's
    divergence: float = 0.0  # KL(dense || this) of those predictions, in nats
    agreeing: int = 0  # of those predictions, the ones whose likeliest token is the dense model's too

    def __add__(self, other: "Measures") -> "Measures":
        return Measures(
            self.tokens + other.tokens,
            self.nats + other.nats,
            self.compared + other.compared,
            self.divergence + other.divergence,
            self.agreeing + other.agreeing,
        )

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.nats / self.tokens)

    @property
    def kl(self) -> float | None:
        """KL(dense || this) in nats a token; None where nothing was compared."""
        return self.divergence / self.compared if self.compared else None

    @property
    def top1_agreement(self) -> float | None:
        """Share of the predictions whose likeliest token is the dense model's; None where nothing was compared."""
        return self.agreeing / self.compared if self.compared else None


def measure(head: Head, hidden: Tensor, tokens: Tensor, dense: tuple[Head, Tensor] | None = None) -> Measures:
    """The measures of windows `tokens` (S, T) whose last block's output is `hidden` (S, T, D).

    `dense`: the dense model's head and its hidden states of the same windows, to compare with.
    """
    nats, count, divergence, agreeing = 0.0, 0, 0.0, 0
    for sample, (states, targets) in enumerate(zip(hidden, tokens, strict=True)):
        for start in range(0, len(targets) - 1, HEAD_POSITIONS):
            stop = min(start + HEAD_POSITIONS, len(targets) - 1)
            logits = head(states[None, start:stop])[0]
            loss = nn.functional.cross_entropy(logits.float(), targets[start + 1 : stop + 1], reduction="none")
            nats += float(loss.sum(dtype=torch.float64))
            count += stop - start
            if dense is not None:
                dense_head, dense_hidden = dense
                apart, same = compare(dense_head(dense_hidden[sample][None, start:stop])[0], logits)
                divergence, agreeing = divergence + apart, agreeing + same
    return Measures(count, nats, count if dense is not None else 0, divergence, agreeing)


def compare(dense: Tensor, other: Tensor) -> tuple[float, int]:
    """KL(dense || other) = sum_v p_v (log p_v - log q_v) in nats, summed over the positions of two sets of logits
    (P, V), and at how many of these both have the same likeliest token.

    Log-softmax in float32, sums in float64.
    """
    divergence, agreeing = 0.0, 0
    for dense_PV, other_PV in zip(dense.split(COMPARED_POSITIONS), other.split(COMPARED_POSITIONS), strict=True):
        log_p, log_q = dense_PV.float().log_softmax(-1), other_PV.float().log_softmax(-1)
        divergence += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
        agreeing += int((dense_PV.argmax(-1) == other_PV.argmax(-1)).sum())
    return divergence, agreeing
