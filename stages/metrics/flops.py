"""Floating-point operations from shapes: a multiplication and an addition count two.

Matrix products and shadows only; norms, activations and softmax are a per cent or so of them. What a reconstruction
takes is counted by `espalier.stages.reconstruction.fit.fit` itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from espalier.stages.model.families import head_width


@dataclass(frozen=True, slots=True)
class Shapes:
    """What decides the products of one forward pass through a decoder.

    `parameters`: weights that multiply every token (the head too, an embedding's look-up not; of experts those that a
    token is routed to); `layers` attention layers whose heads together are `width` wide.
    """

    parameters: int
    layers: int = 0
    width: int = 0


def forward_flops(shapes: Shapes, tokens: int, length: int) -> float:
    """2·P·tokens for the weights, and 2·layers·width·tokens·length for causal attention over windows of `length`.

    Scores and weighted sums are 2·2·width·length a token and layer; a causal mask leaves half of them.
    """
    return 2.0 * tokens * (shapes.parameters + shapes.layers * shapes.width * length)


def training_flops(shapes: Shapes, tokens: int, length: int) -> float:
    """A forward and a backward pass, which costs two: 6·P·tokens and attention's share, without recomputation."""
    return 3.0 * forward_flops(shapes, tokens, length)


def tracking_flops(weights: int, snapshots: int) -> float:
    """A multiplication and an addition for every weight and snapshot that a shadow takes in."""
    return 2.0 * weights * snapshots


def shapes_of(matrices: Iterable[tuple[str, int, int]], config: Any) -> Shapes:
    """The shapes of a decoder: its blocks' matrices as (name on disk, out, in), and its Hugging Face configuration.

    Of experts the share counts that a token is routed to; the head counts, tied to the embedding or not.
    """
    text = config.get_text_config()
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((count for name in names if (count := getattr(text, name, None))), None)
    share = getattr(text, "num_experts_per_tok", experts) / experts if experts else 1.0
    inside = sum(out * into * (share if ".experts." in name else 1.0) for name, out, into in matrices)
    heads = text.num_attention_heads
    return Shapes(round(inside) + text.hidden_size * text.vocab_size, text.num_hidden_layers, heads * head_width(text))


def encoder_shapes(matrices: Iterable[tuple[str, int, int]], layers: int, width: int) -> Shapes:
    """The shapes of an encoder's blocks as wide as their heads together. Nothing is masked: attention counts in full,
    as that of a decoder of twice the width."""
    return Shapes(sum(out * into for _, out, into in matrices), layers, 2 * width)
