"""The vision tower of a model that reads images too: its blocks pruned like a language tower's, an image a sample.

Again the model's own code runs around stubs: it makes the first block's input out of pixels, and tells how each block
is called, how wide it is and how many positions an image takes. Text does not pass through here: there are no logits.
"""

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from espalier.stages.loading.skeleton import Skeleton
from espalier.stages.model.calls import Call
from espalier.stages.model.families import Tower
from espalier.stages.model.packing import Passage
from espalier.stages.storage.hf_checkpoint import Checkpoint

MOST_PATCHES = 1 << 16  # of an image where images may be of any size


class VisionSkeleton(Skeleton):
    """A model without weights, seen from its vision tower. What lies outside its blocks and behind them is never
    loaded; what lies before them is in memory while images are embedded, between `load_vision` and `unload_vision`."""

    tower: ClassVar[Tower] = "vision"

    def __init__(
        self,
        config: PreTrainedConfig,
        dtype: torch.dtype,
        device: str = "cpu",
        checkpoint: Checkpoint | None = None,
        weights: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, dtype, device, checkpoint, weights)
        with ExitStack() as hooks:
            before = _watched(self.model, hooks)
            hidden = self.embed(self._blank(1))
        self.hidden_size = hidden.shape[-1]
        self._patches = hidden.shape[1]  # of every image, unless they are packed
        self.context = MOST_PATCHES if self.layout.packed else self._patches
        self.vision = self.ends = frozenset(before)

    def _find_passages(self) -> list[Passage]:
        return []  # hidden states alone

    def _blank(self, images: int, grids: Tensor | None = None) -> dict[str, Tensor]:
        """So many images with nothing on them, of the size that the tower takes; or of `grids` of patches, (images, 3)
        as time, height and width."""
        eye = self.config.vision_config
        nothing = torch.zeros((), dtype=self.dtype)
        if not self.layout.packed:
            return {"pixel_values": nothing.expand(images, *self.image_shape)}
        if grids is None:
            grids = torch.tensor([[1, eye.spatial_merge_size, eye.spatial_merge_size]]).expand(images, 3)
        values = eye.in_channels * eye.temporal_patch_size * eye.patch_size**2
        return {"pixel_values": nothing.expand(int(grids.prod(1).sum()), values), "image_grid_thw": grids}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width of the images that the tower takes, where it takes no others."""
        eye = self.config.vision_config
        return eye.num_channels, eye.image_size, eye.image_size

    def _look(self, inputs: Mapping[str, Tensor]) -> object:
        model: Any = self.model
        given = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        return model.get_image_features(**given)

    def seen(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of an image processor's outputs, what the tower looks at."""
        model: Any = self.model
        wanted = inspect.signature(model.get_image_features).parameters
        return {name: values for name, values in inputs.items() if name in wanted}

    def embed(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The first block's input (images, positions, width) for what `seen` leaves of some images; `load_vision` comes
        before that. Images whose patches are packed come one at a time."""
        hidden = self._entering(lambda: self._look(inputs))
        return hidden[None] if self.layout.packed else hidden

    def calls(self, samples: int, length: int, varying: Mapping[str, Tensor] | None = None) -> list[Call]:
        """How the tower calls each block for so many images, whole ones."""
        grids = (varying or {}).get("image_grid_thw")
        calls = self._called(lambda: self._look(self._blank(samples, grids)))
        return [replace(call, packed=self.layout.packed) for call in calls]

    def positions(self, length: int, first: Mapping[str, Tensor]) -> int:
        """How many positions the (first) image has: blocks are called for whole ones."""
        return int(first["image_grid_thw"].prod()) if self.layout.packed else self._patches

    def ends_wanted(self, embedding: bool = True, head: bool = True) -> dict[str, str]:
        """Nothing before there are images; see `load_vision`."""
        return {}


def _watched(model: nn.Module, hooks: ExitStack) -> set[str]:
    """The names of the parameters that the model will have passed, filled as it runs until `hooks` are closed: all of
    a module that it is through with, a module's own where it is still inside."""
    passed: set[str] = set()

    def watch(name: str, module: nn.Module) -> None:
        prefix = f"{name}." if name else ""

        def entered(*_: object) -> None:
            passed.update(f"{prefix}{inside}" for inside, _ in module.named_parameters(recurse=False))

        def left(*_: object) -> None:
            passed.update(f"{prefix}{inside}" for inside, _ in module.named_parameters())

        hooks.callback(module.register_forward_pre_hook(entered).remove)
        hooks.callback(module.register_forward_hook(left).remove)

    for name, module in model.named_modules():
        watch(name, module)
    return passed


SKELETONS: Mapping[Tower, type[Skeleton]] = {"language": Skeleton, "vision": VisionSkeleton}
