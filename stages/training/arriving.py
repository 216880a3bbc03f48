"""Loading a model one tensor at a time, so that a rank of ZeRO's stage 3 never holds all of it.

Its parameters have their shapes and no memory (one zero, seen everywhere) until they are given their values; stage 3
takes them one by one, cuts each among the ranks, and lets the rest of it go before the next.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from espalier.stages.loading.skeleton import read_config
from espalier.stages.loading.weight_mapping import WeightMapping
from espalier.stages.model.empty import empty_model
from espalier.stages.storage.hf_checkpoint import Checkpoint
from espalier.stages.training.model import has_weights

Values = Callable[[str], Tensor]  # a parameter's name -> what it begins with


def hollow_model(
    directory: Path, dtype: torch.dtype, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Values] | None:
    """The model in training mode, its parameters without memory, and where to get their values, on the CPU.

    None for a model that has to be made whole: one that begins at random (transformers initialises it in one go, from
    one stream of random numbers), and one whose checkpoint does not have every parameter under a name of its own.
    """
    if not has_weights(directory):
        return None
    checkpoint = Checkpoint(directory)
    model = empty_model(read_config(directory, trust_remote_code), dtype)
    model.tie_weights()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    storage = WeightMapping(model, shapes, checkpoint.entries)
    if not all(name in storage for name, _ in model.named_parameters()):
        return None
    _hollow(model)
    buffers = [name for name, _ in model.named_buffers() if name in storage]
    for name, value in storage.load(checkpoint, buffers, dtype, "cpu").items():
        model.get_buffer(name).copy_(value)
    return model.train(), lambda name: storage.load(checkpoint, [name], dtype, "cpu")[name]


def _hollow(model: nn.Module) -> None:
    """Replace parameters on the meta device, where no values can be given, by ones without memory; the tied stay so."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                nothing = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                made[id(parameter)] = nn.Parameter(nothing, requires_grad=parameter.requires_grad)
            setattr(module, name, made[id(parameter)])


class Arriving(nn.Module):
    """`model` as a module whose parameters get their values when they are come to, and not before."""

    def __init__(self, model: nn.Module, values: Values) -> None:
        super().__init__()
        self.model, self._values = model, values

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Each parameter once, with its values. Whoever takes it lets go of them before taking the next."""
        for name, parameter in self.model.named_parameters(recurse=recurse):
            parameter.data = self._values(name).to(parameter.dtype)
            yield parameter
