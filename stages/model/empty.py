"""The model that transformers builds from a config, on the meta device: no memory for its weights."""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from accelerate import init_empty_weights
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from espalier.stages.errors import Refusal
from espalier.stages.model.families import sees_images

LARGE = 1 << 20  # numbers: a tensor of more, made to be filled later, is a weight


class _LargeWithoutMemory(TorchFunctionMode):
    """Within it large tensors without values are made on the meta device: a model's weights, before they become
    parameters. All experts of a block can be one of 30 GB, which no host has to have for a moment."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            size = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
            if prod(size) > LARGE:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


def auto_class(config: PreTrainedConfig) -> Any:
    """The transformers class that makes a whole model of `config`, head included."""
    return AutoModelForImageTextToText if sees_images(config.model_type) else AutoModelForCausalLM


TEXT_ALONE = ("gemma3n",)  # families that also see and hear, and are built here without: they see with a timm model


def text_alone(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the model that text passes through, where that is all that is built of a family here."""
    return config.get_text_config() if config.model_type in TEXT_ALONE else config


def empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of `config` without memory for its parameters; its buffers hold what they should.

    Raises Refusal for a config that transformers reads but makes no model of, or only with a package that is not here.
    """
    auto = auto_class(config)
    try:
        with init_empty_weights(include_buffers=False), no_init_weights(), _LargeWithoutMemory():
            return auto.from_config(config, dtype=dtype)
    except ImportError as error:
        raise Refusal(f"{config.name_or_path or config.model_type}: {' '.join(str(error).split())}") from error
    except Exception as error:
        raise Refusal(
            f"{config.name_or_path or config.model_type}: transformers makes no model of its config.json ({error!r}); "
            "fetch that file again"
        ) from error
