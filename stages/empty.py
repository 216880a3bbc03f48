"""The model that transformers makes of a config, without memory for its weights."""

from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from stages.blocks import sees_images
from stages.errors import Refusal


def auto_class(config: PreTrainedConfig) -> Any:
    """The transformers class that makes a whole model of `config`, head included."""
    return AutoModelForImageTextToText if sees_images(config.model_type) else AutoModelForCausalLM


def empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of `config` without memory for its parameters; its buffers hold what they should.

    Raises Refusal for a config that transformers reads but makes no model of.
    """
    auto = auto_class(config)
    try:
        with init_empty_weights(include_buffers=False), no_init_weights():
            return auto.from_config(config, dtype=dtype)
    except Exception as error:
        raise Refusal(
            f"{config.name_or_path or config.model_type}: transformers makes no model of its config.json ({error!r}); "
            "fetch that file again"
        ) from error
