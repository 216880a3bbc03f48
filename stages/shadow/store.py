"""A shadow on disk: a directory like a model's checkpoint, whose tensors hold |q| in place of the weights.

DIR/shadow.json          how it came about: the tracker's options, how many snapshots; digests of names and shapes,
                         and of the files
DIR/config.json          the model's
DIR/model*.safetensors   float32, under the names and in the shapes that transformers saves such a model with

So a block's importances are read as its weights are: experts apart, matrices stored the other way round, and all.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from espalier.stages.errors import Refusal
from espalier.stages.loading.skeleton import read_config, tied_names
from espalier.stages.loading.vision import SKELETONS
from espalier.stages.model.empty import empty_model
from espalier.stages.model.families import Tower
from espalier.stages.shadow.spec import ShadowSpec
from espalier.stages.storage.files import file_digest, share, write_text
from espalier.stages.storage.hf_checkpoint import Checkpoint

RECORD = "shadow.json"


def write_shadow(
    directory: Path, config: PreTrainedConfig, importances: Mapping[str, Tensor], spec: ShadowSpec, updates: int
) -> None:
    """Write the importances of a model of `config`, by parameter name (those of `model.named_parameters()`).

    Raises Refusal if one is missing or of another shape than the model's.
    """
    model = empty_model(config, torch.float32)
    shapes = _untied_shapes(model)
    for name, shape in shapes.items():
        if name not in importances or importances[name].shape != shape:
            found = tuple(importances[name].shape) if name in importances else "not there"
            raise Refusal(f"shadow: {name} is {found}, the model's {tuple(shape)}; track all of this model")
    tensors = {name: importances[name].detach().float().cpu() for name in shapes}
    tensors |= {name: tensors[partner] for name, partner in tied_names(model).items() if partner in tensors}
    model.load_state_dict(tensors, assign=True, strict=False)
    model.tie_weights()
    model.save_pretrained(directory)
    share(directory)
    files = {path.name: file_digest(path) for path in sorted(directory.glob("*.safetensors"))}
    record = asdict(spec) | {"updates": updates, "digest": digest(shapes), "files": files}
    write_text(directory / RECORD, json.dumps(record, indent=1) + "\n")


def _untied_shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    tied = tied_names(model)
    return {name: parameter.shape for name, parameter in model.named_parameters() if name not in tied}


def digest(shapes: Mapping[str, Iterable[int]]) -> str:
    """A digest of parameter names and shapes."""
    listed = sorted((name, list(shape)) for name, shape in shapes.items())
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def read_record(directory: Path) -> dict[str, Any]:
    """What shadow.json says. Raises Refusal if the directory holds no shadow."""
    try:
        record = json.loads((directory / RECORD).read_text())
        record["digest"], record["updates"]
    except (OSError, ValueError, KeyError, TypeError):
        raise Refusal(
            f"shadow {directory}: no {RECORD} in it; give the shadow/ that `espalier retrain --shadow` leaves in its "
            "output"
        ) from None
    return record


def check_shadow(directory: Path, config: PreTrainedConfig) -> str:
    """A digest that tells this shadow from others. Raises Refusal unless it is one of a model of `config`."""
    record = read_record(directory)
    if record["digest"] != digest(_untied_shapes(empty_model(config, torch.float32))):
        theirs = read_config(directory)
        raise Refusal(
            f"shadow {directory}: of another model ({_sizes(theirs)}), not of this one ({_sizes(config)}); "
            "give the shadow that was tracked while this model was trained"
        )
    if not record["updates"]:
        raise Refusal(f"shadow {directory}: holds no snapshot; train for longer, or track more often")
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def _sizes(config: PreTrainedConfig) -> str:
    text = config.get_text_config()
    return f"{config.model_type}, {text.num_hidden_layers} blocks, {text.hidden_size} wide"


class Shadow:
    """The importances of a shadow directory, a block's at a time. Raises Refusal if it is none."""

    def __init__(self, directory: Path, device: str = "cpu", tower: Tower = "language") -> None:
        read_record(directory)
        self._checkpoint = Checkpoint(directory)
        self._skeleton = SKELETONS[tower](read_config(directory), torch.float32, device, self._checkpoint)

    def load(self, index: int, inside: Iterable[str]) -> dict[str, Tensor]:
        """|q| of tensors of block `index`, by their names inside it, float32."""
        return self._skeleton.load_tensors(index, sorted(inside), self._checkpoint)
