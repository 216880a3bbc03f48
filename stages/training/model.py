"""The model that is to be trained: read from a checkpoint or begun at random, pruned like another one if asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from espalier.stages.errors import Refusal
from espalier.stages.loading.skeleton import Skeleton, read_config
from espalier.stages.model.empty import auto_class
from espalier.stages.storage.headers import INDEX, PICKLES
from espalier.stages.storage.hf_checkpoint import Checkpoint


def has_weights(directory: Path) -> bool:
    """Whether there is more than a config: then what is there has to be a checkpoint."""
    return any(next(directory.glob(pattern), None) for pattern in ("*.safetensors", INDEX, *PICKLES))


def load_model(directory: Path, dtype: torch.dtype, seed: int, trust_remote_code: bool = False) -> PreTrainedModel:
    """The whole model in `dtype`, in training mode, on the CPU.

    A directory with a config.json and no weights gives the model as transformers initialises it, random from `seed`; in
    float32 first, so that a seed is the same model in every dtype. Not under `deepspeed.zero.Init`: there the modules'
    own defaults would stand (embeddings of deviation 1.0, say), as transformers' initialisation is skipped.

    Raises Refusal for pickles, for a checkpoint that lacks tensors, and for weights that are NaN or infinite.
    """
    config = read_config(directory, trust_remote_code)
    auto = auto_class(config)
    if not has_weights(directory):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = auto.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
        return model.to(dtype).train()
    Checkpoint(directory)
    with without_bars():
        model, notes = auto.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    if notes["missing_keys"]:
        first = sorted(notes["missing_keys"])[0]
        raise Refusal(f"{directory}: no tensor {first}; the checkpoint does not match its config.json")
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter.detach().sum(dtype=torch.float32)):
            raise Refusal(f"{directory}: {name} holds NaN or infinite weights; repair the checkpoint")
    return model.train()


@contextmanager
def without_bars() -> Iterator[None]:
    """Within it transformers draws no progress bar over the lines of a run."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check_mask(model: Path, mask: Path, trust_remote_code: bool = False) -> Skeleton:
    """Raises Refusal unless the checkpoint `mask` has every tensor of `model`, in its shape.

    What comes back knows under which names the mask's tensors lie.
    """
    config = read_config(model, trust_remote_code)
    checkpoint = Checkpoint(mask)
    skeleton = Skeleton(config, torch.float32, checkpoint=checkpoint)
    for name in _prunable(skeleton):
        whole, places = torch.empty(skeleton.storage.shapes[name], device="meta"), skeleton.storage.of(name)
        for stored, part in places.split(whole).items():
            if stored not in checkpoint:
                raise Refusal(f"mask {mask}: no tensor {stored}; give a pruned checkpoint of the model that is trained")
            if (found := checkpoint.entry(stored).shape) != tuple(part.shape):
                raise Refusal(
                    f"mask {mask}: {stored} is {found}, the model's is {tuple(part.shape)}; give a pruned checkpoint "
                    "of the model that is trained"
                )
    return skeleton


class Mask:
    """The zeros of the checkpoint `mask` in the blocks of the model in `directory`, read a parameter at a time."""

    def __init__(self, directory: Path, mask: Path, trust_remote_code: bool = False) -> None:
        skeleton = check_mask(directory, mask, trust_remote_code)
        self._storage, self._checkpoint = skeleton.storage, Checkpoint(mask)
        self.names = frozenset(_prunable(skeleton))

    def fill(self, model: PreTrainedModel) -> None:
        """Make zero in the model what is zero in the mask."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                self.apply(name, parameter)

    def apply(self, name: str, values: Tensor) -> None:
        """Make zero in `values`, the parameter `name`, what is zero in the mask: nothing outside the blocks."""
        if name in self.names:
            values.masked_fill_(self._storage.load(self._checkpoint, [name], torch.float32, "cpu")[name] == 0, 0)


def _prunable(skeleton: Skeleton) -> list[str]:
    """The blocks' parameters of two or more dimensions."""
    return [
        name
        for index in range(len(skeleton.layers))
        for name in skeleton.parameters_of(index).values()
        if len(skeleton.storage.shapes[name]) > 1
    ]


def hold_zeros(model: PreTrainedModel) -> None:
    """From now on, what is zero in the model's matrices gets no gradient, and so stays exactly zero under Adam.

    A zero weight with zero moments and zero gradient moves by 0 / (sqrt(0) + eps) = 0, and its decay is a share of 0.
    The weights themselves are the mask: nothing is kept beside them, so there is nothing to partition, to save or to
    lose, whatever the ZeRO stage and the number of ranks. The hook runs before gradients are reduced, on whole ones,
    so that the norm by which they are clipped is that of the weights that are trained. Vectors (biases, norm gains)
    may begin at zero and are trained like any other.
    """
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.requires_grad:
            parameter.register_hook(_zero_where_zero(parameter))


def checkpoint_activations(model: PreTrainedModel) -> None:
    """From now on a training pass keeps each block's input alone, and computes what is within again on the way back.

    By torch's re-entrant way: the other one compares the tensors of both passes, and under ZeRO's stage 3 parameters
    are empty in one of them. The result is the same, bit for bit. Raises Refusal for a family that cannot.
    """
    if not model.supports_gradient_checkpointing:
        raise Refusal(
            f"activation-checkpointing: transformers' {type(model).__name__} has no way to do it; leave it out, and "
            "use a smaller --microbatch"
        )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})


def _zero_where_zero(parameter: torch.nn.Parameter) -> Any:
    def without_pruned(gradient: Tensor) -> Tensor:
        assert parameter.shape == gradient.shape, "a partitioned parameter is whole while its gradient is computed"
        return gradient.masked_fill(parameter.detach() == 0, 0)

    return without_pruned
