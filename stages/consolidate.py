"""A training run's checkpoint -> a plain Hugging Face checkpoint."""

import shutil
from pathlib import Path

import torch

from stages.retrain_model import load_model
from stages.retrain_spec import RetrainSpec
from stages.zero_checkpoint import MASTER, StoredPieces

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def consolidate(model: Path, checkpoint: Path, output: Path, spec: RetrainSpec) -> None:
    """The trained model in `output`, config.json and safetensors, in the dtype that it was trained in.

    What was not trained is as in `model`. The directory appears under its name when everything is in it. Needs memory
    for the whole model once, in its dtype.
    """
    whole = load_model(model, DTYPES[spec.dtype], spec.seed, spec.trust_remote_code)
    StoredPieces(checkpoint, MASTER).fill(whole)
    gathering = output.with_name(f"{output.name}-unfinished")
    for directory in (gathering, output):
        shutil.rmtree(directory, ignore_errors=True)
    whole.save_pretrained(gathering)
    gathering.rename(output)
