"""`espalier.load`: a checkpoint that was pruned here, or any other, as transformers loads it."""

from pathlib import Path
from typing import TYPE_CHECKING

from espalier.pipeline.run.inputs import load_tokenizer
from espalier.stages.loading.skeleton import read_config
from espalier.stages.model.empty import auto_class
from espalier.stages.storage.hf_checkpoint import Checkpoint, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(
    model: str | Path, dtype: str = "auto", trust_remote_code: bool = False
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The model in `model` (a directory or a hub id) on the CPU, in evaluation mode, and its tokenizer.

    `dtype`: what its weights are held in; auto: as they are stored. Raises Refusal for a directory without a finished
    checkpoint, such as that of a run to be resumed, and for one without a tokenizer.
    """
    directory = resolve(str(model))
    Checkpoint(directory)  # refuses what is no whole checkpoint
    config = read_config(directory, trust_remote_code)
    loaded = auto_class(config).from_pretrained(directory, dtype=dtype, trust_remote_code=trust_remote_code).eval()
    return loaded, load_tokenizer(str(directory), trust_remote_code)
