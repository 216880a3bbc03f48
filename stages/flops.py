"""Floating-point operations from shapes: a multiplication and an addition count two.

Matrix products only; norms, activations and softmax are a per cent or so of them. What a reconstruction takes is
counted by `stages.reconstruct.fit` itself.
"""

from dataclasses import dataclass

from torch import nn


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


def shapes_of(model: nn.Module) -> Shapes:
    """The shapes of a Hugging Face language model, which may stand on the meta device.

    Counts every weight matrix but the look-ups; a head tied to the embedding counts once. Of fused experts
    (three-dimensional weights) those that a token is routed to.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()  # type: ignore[operator]
    routed = getattr(config, "num_experts_per_tok", None)
    parameters = head.weight.numel() if head is not None and id(head.weight) in looked_up else 0
    for weight in model.parameters():
        if weight.dim() == 3 and routed:
            parameters += weight.numel() // weight.shape[0] * routed
        elif weight.dim() == 2 and id(weight) not in looked_up:
            parameters += weight.numel()
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shapes(parameters, config.num_hidden_layers, heads * head_width)
