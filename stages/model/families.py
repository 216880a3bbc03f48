"""The table of model families: what is particular to one and cannot be found in the model itself.

Where blocks are and what their components are called is found in the model (`espalier.stages.model.structure`); a row
says what is not. How a block calls its components, which norm belongs to which, and which linears read the same tensor
is not written down: `trace` watches one forward pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from espalier.stages.errors import Refusal

Tower = Literal["language", "vision"]  # of a model that reads images too; any other is a language tower


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockLayout:
    """Where a family keeps things. Paths are module names, as in `state_dict()`; all but `blocks` inside a block."""

    blocks: str = "model.layers"
    components: tuple[str, ...] = ("self_attn", "mlp")
    chains: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # a component that is no module: its children
    routers: tuple[str, ...] = ()  # choose and weigh the experts: neither pruned nor fitted
    packed: bool = False  # the patches of all images are one sequence, and blocks are called with (patches, width)
    vision: "BlockLayout | None" = None  # where the vision tower of a model that reads images too keeps its things

    @property
    def images(self) -> bool:
        """Whether the family reads images too."""
        return self.vision is not None

    def parts(self, component: str) -> tuple[str, ...]:
        """The children of the block that are the component: itself, if it is a module."""
        return self.chains.get(component, (component,))


_ENCODER = BlockLayout(blocks="model.vision_tower.encoder.layers")  # CLIP and SigLIP
_IMAGES = BlockLayout(blocks="model.language_model.layers", vision=_ENCODER)

FAMILIES: dict[str, BlockLayout] = {  # what `espalier.stages.model.structure` would not find
    "gemma3": _IMAGES,
    "gemma3n_text": BlockLayout(
        components=("laurel", "self_attn", "mlp", "per_layer_input_gate", "per_layer_projection"),
        routers=("altup",),  # weighs its streams
    ),
    "llava": _IMAGES,
    "opt": BlockLayout(blocks="model.decoder.layers", chains={"mlp": ("fc1", "activation_fn", "fc2")}),
    "qwen2_vl": BlockLayout(
        blocks="model.language_model.layers",
        vision=BlockLayout(blocks="model.visual.blocks", components=("attn", "mlp"), packed=True),
    ),
}


def sees_images(family: str) -> bool:
    """Whether models of the family read images too, as far as is known here."""
    return family in FAMILIES and FAMILIES[family].images


def vision_of(family: str) -> BlockLayout:
    """Where the family's vision tower keeps its things. Raises Refusal for one that has none, as far as known here."""
    vision = FAMILIES[family].vision if family in FAMILIES else None
    if vision is None:
        seeing = ", ".join(name for name, other in sorted(FAMILIES.items()) if other.images)
        raise Refusal(f"tower vision: {family} reads text only; leave --tower out, or give a model that sees: {seeing}")
    return vision


def head_width(text: Any) -> int:
    """Channels of an attention head by a text model's config: the widest where layers differ, as Gemma 4's do; 0 where
    nothing says."""
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else (text,)
    widths = [int(width) for layer in layers if (width := getattr(layer, "head_dim", None))]
    heads = getattr(text, "num_attention_heads", None) or 1
    return max(widths, default=int(getattr(text, "hidden_size", 0)) // heads)


def _within(module: str, parts: Sequence[str]) -> bool:
    return any(module == part or module.startswith(f"{part}.") for part in parts)
