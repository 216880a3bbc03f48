"""Block files and ends -> a plain Hugging Face checkpoint. The index is written last: without it there is no model."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from espalier.pipeline.planning.model_info import model_facts
from espalier.stages.errors import Refusal
from espalier.stages.loading.skeleton import read_config
from espalier.stages.storage.config_file import DTYPE_KEYS, read_config_file
from espalier.stages.storage.files import write_text
from espalier.stages.storage.headers import INDEX
from espalier.stages.storage.hf_checkpoint import Checkpoint


def sparsity_of(directory: Path, trust_remote_code: bool = False) -> float:
    """Counted zeros / counted weights over the prunable matrices, read one matrix at a time."""
    checkpoint, zeros = Checkpoint(directory), 0
    facts = model_facts(read_config(directory, trust_remote_code), str(directory), "auto", checkpoint)
    for name, _, _ in facts.linears:
        zeros += int((checkpoint.load([name])[name] == 0).sum())
    return zeros / facts.prunable


# Weights in any format, and what says where they lie; everything else beside them is copied: tokenizer, chat template,
# licence, the code that a config's auto_map names (which nothing here runs). Of folders only more chat templates are:
# others hold the same weights once more (original/, onnx/).
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".msgpack", ".h5", ".onnx", ".index.json")
TEMPLATES = "additional_chat_templates"
COPIED_BYTES = 64 << 20  # larger files beside the weights are not part of a model


def copy_companions(model: Path, output: Path, dtype: str) -> None:
    """Copy config, tokenizer and the like. config.json names the `dtype` that all weights were saved in; with "auto",
    where each kept its own, what it named before.

    Raises Refusal if the model's config.json is no longer one.
    """
    for path in sorted(model.iterdir()):
        if path.is_file() and not path.name.endswith(_NOT_COPIED) and path.stat().st_size <= COPIED_BYTES:
            shutil.copyfile(path, output / path.name)
    for template in sorted((model / TEMPLATES).glob("*.jinja")):
        (output / TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(template, output / TEMPLATES / template.name)
    file = read_config_file(model)
    stale = [key for key in DTYPE_KEYS if dtype != "auto" and file.values.get(key, dtype) != dtype]
    named = "transformers_weights" in file.values  # the file to load, which here is another
    if file.mended or stale or named:
        config = file.values | dict.fromkeys(stale, dtype)
        config.pop("transformers_weights", None)
        write_text(output / "config.json", json.dumps(config, indent=2))


def write_index(output: Path, files: Iterable[str]) -> None:
    """Write model.safetensors.index.json over `files`, read back from their headers.

    Raises Refusal if a file is missing or cut short.
    """
    weight_map: dict[str, str] = {}
    total = 0
    for file in files:
        if not (output / file).is_file():
            raise Refusal(f"{output / file}: gone since it was written; `espalier resume {output}` makes it again")
        for entry in Checkpoint.of_file(output / file).entries.values():
            weight_map[entry.name] = file
            total += entry.bytes
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(output / INDEX, json.dumps(index, indent=1))
