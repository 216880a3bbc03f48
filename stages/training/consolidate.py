"""A training run's checkpoint -> plain Hugging Face checkpoints: the model, and the importances of its weights."""

import shutil
from pathlib import Path

from transformers import PreTrainedModel

from espalier.stages.loading.ends import copy_unread
from espalier.stages.shadow.store import write_shadow
from espalier.stages.storage.files import move_into_place, share
from espalier.stages.training.checkpoint import MASTER, StoredSlices
from espalier.stages.training.model import has_weights, load_model
from espalier.stages.training.spec import DTYPES, RetrainSpec

IMPORTANCE = "importance"  # the kind of its slices


def consolidate(checkpoint: Path, output: Path, spec: RetrainSpec) -> PreTrainedModel:
    """The trained model, written to `output` as config.json and safetensors in the dtype that it was trained in.

    What was not trained is as in the model that the run began with; what the model does not read of its checkpoint lies
    in files of its own, which no index names. The directory appears under its name when everything is in it. Needs
    memory for the whole model once, in its dtype.
    """
    source = Path(spec.model)
    model = load_model(source, DTYPES[spec.dtype], spec.seed, spec.trust_remote_code)
    StoredSlices(checkpoint, MASTER).fill(model)
    gathering = _emptied(output)
    model.save_pretrained(gathering)
    share(gathering)
    if has_weights(source):
        copy_unread(source, gathering, spec.trust_remote_code)
    move_into_place(gathering, output)
    return model


def consolidate_shadow(model: PreTrainedModel, slices: Path, output: Path, spec: RetrainSpec, updates: int) -> None:
    """The shadow directory of `model`, from all ranks' slices. A weight that was not trained is its own average."""
    stored = StoredSlices(slices, IMPORTANCE)
    importances = {
        name: stored.read(name, 0, parameter.numel()).view(parameter.shape)
        if name in stored
        else parameter.detach().float().abs()
        for name, parameter in model.named_parameters()
    }
    gathering = _emptied(output)
    assert spec.shadow is not None
    write_shadow(gathering, model.config, importances, spec.shadow, updates)
    move_into_place(gathering, output)


def _emptied(output: Path) -> Path:
    """Where to gather what is to become `output`; what either held before is gone."""
    gathering = output.with_name(f"{output.name}-unfinished")
    for directory in (gathering, output):
        shutil.rmtree(directory, ignore_errors=True)
    return gathering
