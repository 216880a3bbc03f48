"""config.json as it lies on disk: what transformers would stumble over is understood, or refused in one line."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from espalier.stages.errors import Refusal
from espalier.stages.storage.quantised import SECTIONS, WAYS_BACK, refuse_quantised

DTYPE_KEYS = ("dtype", "torch_dtype")  # the first wins
DTYPES = {
    **{name: name for name in ("float32", "bfloat16", "float16", "float64")},
    "float": "float32",
    "fp32": "float32",
    "bf16": "bfloat16",
    "half": "float16",
    "fp16": "float16",
    "double": "float64",
}


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """What a config.json says, every dtype in it under the name that torch gives it."""

    path: Path
    values: dict[str, Any]
    mended: bool  # whether it had to be changed for transformers to read it

    @property
    def model_type(self) -> str:
        return self.values["model_type"]

    def config(self, trust_remote_code: bool = False) -> PreTrainedConfig:
        """What transformers makes of it. Raises Refusal for what it cannot make anything of."""
        try:
            config = self._made(trust_remote_code)
            blocks = getattr(config.get_text_config(), "num_hidden_layers", None)
        except Exception as error:
            said = " ".join(line.strip() for line in str(error).strip().splitlines()[:2]) or type(error).__name__
            raise Refusal(f"{self.path}: transformers cannot read it ({said}); fetch that file again") from error
        if isinstance(blocks, int) and blocks < 1:
            raise Refusal(f"{self.path}: num_hidden_layers {blocks}: nothing to prune; fetch that file again")
        return config

    def _made(self, trust_remote_code: bool) -> PreTrainedConfig:
        if self.mended:
            return AutoConfig.for_model(**self.values | {"name_or_path": str(self.path.parent)})
        return AutoConfig.from_pretrained(self.path.parent, trust_remote_code=trust_remote_code)


def read_config_file(directory: Path) -> ConfigFile:
    """The config.json of a checkpoint.

    Raises Refusal if it cannot be read, names no model type, or says that the weights are quantised.
    """
    path = directory / "config.json"
    try:
        raw = path.read_bytes()
        values = json.loads(raw.decode("utf-8-sig"))
        if not isinstance(values, dict):
            raise ValueError(f"a {type(values).__name__}, not an object")
        if not isinstance(values.get("text_config") or {}, dict):
            raise ValueError("its text_config is not an object")
    except (OSError, ValueError, RecursionError) as error:
        said = "empty" if isinstance(error, ValueError) and not raw.strip() else error
        raise Refusal(f"{path}: cannot be read ({said}); fetch that file again") from None
    if not isinstance(values.get("model_type"), str) or not values["model_type"]:
        raise Refusal(f"{path}: names no model_type; fetch the config.json of the checkpoint's transformers format")
    refuse_quantised(directory, values)
    clean = _clean(values, path)
    text = clean.get("text_config")
    if isinstance(text, dict) and not any(clean.get(key) for key in DTYPE_KEYS):
        stated = [text[key] for key in DTYPE_KEYS if text.get(key)]
        clean |= {"dtype": stated[0]} if stated else {}
    return ConfigFile(path, clean, mended=clean != values or raw.startswith(b"\xef\xbb\xbf"))


def stated_config(directory: Path, trust_remote_code: bool = False) -> dict[str, PreTrainedConfig]:
    """What transformers' other Auto classes are to be given, so that they do not stumble over the config.json that had
    to be mended: "config" and it, or nothing. Raises Refusal as `read_config_file` does, for one that is there."""
    if not (directory / "config.json").is_file():
        return {}
    file = read_config_file(directory)
    return {"config": file.config(trust_remote_code)} if file.mended else {}


def _clean(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """`values` with its dtypes, and those of the configs in it, as torch names them; "auto" is left out."""
    clean = {
        name: _clean(value, path) if name.endswith("_config") and isinstance(value, dict) else value
        for name, value in values.items()
        if value or name not in SECTIONS  # an empty one quantises nothing, and transformers stumbles over it
    }
    for key in DTYPE_KEYS:
        if clean.get(key) is not None:
            clean[key] = _dtype(clean[key], key, path)
            if clean[key] is None:
                del clean[key]
    return clean


def _dtype(value: Any, key: str, path: Path) -> str | None:
    if isinstance(value, dict):  # by parts of the model, the whole under ""
        value = value.get("")
    name = str(value).removeprefix("torch.")
    if value is None or name == "auto":
        return None
    if name in DTYPES:
        return DTYPES[name]
    if "float8" in name or "fp8" in name.lower() or "int8" in name:
        raise Refusal(
            f"{path}: {key} {value!r} says that the weights are quantised to 8 bits; prune the original checkpoint, or "
            f"a plain one made with transformers: AutoModelForCausalLM.{WAYS_BACK['fp8']}; if the weights are plain, "
            f'write {key} "bfloat16"'
        )
    raise Refusal(f"{path}: {key} {value!r} is none of {', '.join(dict.fromkeys(DTYPES.values()))}; write what it is")
