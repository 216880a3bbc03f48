"""Quantised checkpoints (packed or scaled weights): recognised by config or headers alone, and refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from espalier.stages.errors import Refusal
from espalier.stages.storage.headers import TensorEntry

# What quantises, and the call that makes a plain checkpoint of it again (in its original format it would be quantised
# again when it is saved); of others only the original is one.
_SAVED = ".save_pretrained(..., save_original_format=False)"
_DEQUANTISED = f"from_pretrained(..., quantization_config={{}}(dequantize=True)){_SAVED}"
WAYS_BACK = {
    "fp8": _DEQUANTISED.format("FineGrainedFP8Config"),
    "compressed-tensors": _DEQUANTISED.format("CompressedTensorsConfig"),
    "mxfp4": _DEQUANTISED.format("Mxfp4Config"),
    "bitsandbytes": f"from_pretrained(...).dequantize(){_SAVED}",
}
SECTIONS = ("quantization_config", "compression_config")  # of config.json; the second is what older ones say
MODELOPT = "hf_quant_config.json"


def refuse_quantised(directory: Path, config: Mapping[str, Any]) -> None:
    """Raises Refusal, with the way to a plain checkpoint, if `config` or a file beside it says that weights are
    quantised."""
    for part in (config, config.get("text_config")):
        for section in SECTIONS:
            if isinstance(part, Mapping) and (said := part.get(section)):
                method = said.get("quant_method", "an unknown method") if isinstance(said, Mapping) else said
                raise quantised(directory, str(method))
    path = directory / MODELOPT
    if not path.is_file():
        return
    try:
        said = json.loads(path.read_bytes())["quantization"]
        method = said.get("quant_algo")  # None where only the cache of keys and values is quantised
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refusal(f"{path}: cannot be read ({error!r}); fetch that file again") from None
    if method:
        raise quantised(directory, f"ModelOpt's {method} ({MODELOPT})")


def quantised(directory: Path, method: str) -> Refusal:
    """The refusal of weights that `method` quantised."""
    way = WAYS_BACK.get(method)
    plain = f", or a plain one made with transformers: AutoModelForCausalLM.{way}" if way else ""
    return Refusal(f"{directory}: quantised by {method}; prune the original checkpoint{plain}; quantise the result")


def not_plain(directory: Path, entry: TensorEntry) -> Refusal:
    """The refusal of a weight that is not stored as floating-point numbers of 16 bits or more."""
    return Refusal(
        f"{directory}: {entry.name} is stored as {entry.dtype}, quantised or no weight at all; prune the original "
        "checkpoint, or a plain one made of it (every weight times its scale, as bfloat16); quantise the result"
    )
