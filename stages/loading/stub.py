"""A stand-in for the decoder layers, so that the model's own code runs around blocks that lie elsewhere."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from espalier.stages.model.calls import Call

Visit = Callable[[int, Call, Tensor], Tensor]  # (layer, how it was called, its input) -> its output


class Answers:
    """In which form the layers give their hidden states: alone, or first in a tuple (BLOOM, Falcon, GPT-J)."""

    def __init__(self) -> None:
        self._beside: int | None = None
        self._known = False

    def of(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor) -> Any:
        """`hidden` as `layer`, called so, would give it; in a tuple, nothing stands beside it."""
        if not self._known:
            self._beside, self._known = _beside(layer, args, kwargs), True
        return hidden if self._beside is None else (hidden, *[None] * self._beside)


def _beside(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """How much the layer gives beside its hidden states, seen on the meta device; None where it gives them alone."""
    try:
        there = copy.deepcopy(layer).to("meta")
        given, named = tree_map_only(Tensor, _shape_alone, (args, kwargs))
        output = there(*given, **named)
    except Exception:  # it looks at numbers, and here are none: taken for one that gives a tensor, as most do
        return None
    return len(output) - 1 if isinstance(output, tuple | list) else None


def _shape_alone(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


class Stub(nn.Module):
    """Stands for one decoder layer; what the model reads off the layer (its attention type, say) it reads through."""

    def __init__(self, layer: nn.Module, index: int, visit: Visit, answers: Answers) -> None:
        super().__init__()
        self._kept = (layer,)  # a tuple: not registered as a submodule
        self._index, self._visit, self._answers = index, visit, answers

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_kept"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self._visit(self._index, Call.seen(args, kwargs), Call.hidden_of(args, kwargs))
        return self._answers.of(self._kept[0], args, kwargs, hidden)
