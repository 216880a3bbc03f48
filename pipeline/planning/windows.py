"""How long a window is, and how many stream together."""

from typing import Literal

from espalier.pipeline.planning.model_info import ModelInfo
from espalier.stages.errors import Refusal

MICROBATCH_TOKENS = 2048


LENGTH = 2048


def window_length(facts: ModelInfo, asked: int | Literal["auto"]) -> int:
    """Tokens of a window, or positions of an image (at most, where they may be of any size).

    Raises Refusal if it is longer than the model's context, and for images that are of one length.
    """
    if facts.tower == "vision" and not facts.packed:
        if asked not in ("auto", facts.context):
            raise Refusal(
                f"length {asked} with tower vision: a sample is an image, which takes {facts.context} positions; leave "
                "--length out"
            )
        return facts.context
    if asked == "auto":
        return min(LENGTH, facts.context)
    if asked > facts.context:
        raise Refusal(f"length {asked}: the model's context is {facts.context} tokens; give --length {facts.context}")
    return asked


def microbatch_size(asked: int | Literal["auto"], length: int, packed: bool = False) -> int:
    """Windows streamed together. Raises Refusal for more than one image where they may be `packed`."""
    if packed:
        if asked not in ("auto", 1):
            raise Refusal(
                f"microbatch {asked} with tower vision: this model's images may differ in size, so they pass one at a "
                "time; leave --microbatch out"
            )
        return 1
    return max(1, MICROBATCH_TOKENS // length) if asked == "auto" else asked
