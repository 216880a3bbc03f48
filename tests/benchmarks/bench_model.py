"""Random Llama checkpoints to measure on, token ids to calibrate with, and one line of JSON for each result.

python tests/benchmarks/bench_model.py OUT [--hidden 1024 --blocks 8 --heads 16 --kv-heads 8 --mlp 2816 ...]
"""

import argparse
import json
import platform
import random
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE

from espalier.stages.devices import has_units

SMALL = {"hidden": 1024, "blocks": 8, "heads": 16, "kv_heads": 8, "mlp": 2816, "vocab": 8192}  # 111 M parameters
LARGE = {"hidden": 4096, "blocks": 18, "heads": 32, "kv_heads": 8, "mlp": 14336, "vocab": 32000}  # 8.4 GB in bf16


def make_llama(out: Path, shape: dict[str, int] = SMALL, dtype: torch.dtype = torch.bfloat16) -> Path:
    """`out`, holding a random Llama of this shape, made one block in memory at a time; left alone if it is there."""
    if (out / "config.json").exists():
        return out
    from transformers import AutoModelForCausalLM, LlamaConfig

    out.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["mlp"],
        num_hidden_layers=shape["blocks"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype=dtype,
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    files: dict[str, str] = {}
    for name in shapes:
        block = name.split(".")[2] if name.startswith("model.layers.") else "ends"
        files[name] = f"model-{block}.safetensors"
    for file in dict.fromkeys(files.values()):
        members = [name for name in files if files[name] == file]
        tensors = {name: _random(shapes[name], "norm" in name, dtype, generator) for name in members}
        save_file(tensors, out / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    letters = {chr(code): code for code in range(128)}
    Tokenizer(BPE(vocab=letters, merges=[])).save(str(out / "tokenizer.json"))  # the peer asks for one
    (out / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    config.save_pretrained(out)
    return out


def _random(shape: torch.Size, norm: bool, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if norm:
        return torch.ones(shape, dtype=dtype)
    return torch.empty(shape).normal_(0, shape[-1] ** -0.5, generator=generator).to(dtype)


def token_ids(samples: int, length: int, vocabulary: int) -> list[list[int]]:
    """Random windows of token ids, the same each time."""
    source = random.Random(0)
    return [[source.randrange(vocabulary) for _ in range(length)] for _ in range(samples)]


def report(benchmark: str, result: dict[str, Any]) -> None:
    """One line of JSON: the result, the machine and the versions it was had on."""
    versions = {name: version(name) for name in ("torch", "transformers", "ray")}
    machine = {"processor": _processor(), "python": platform.python_version()}
    print(json.dumps({"benchmark": benchmark, **result, "machine": machine, "versions": versions}))


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    cores = sum(line.startswith("processor") for line in lines)
    return f"{cores} x {name}, bf16 units: {has_units(torch.bfloat16, 'cpu')}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name, default in SMALL.items():
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, type=int, default=default)
    arguments = vars(parser.parse_args())
    print(make_llama(arguments.pop("out"), arguments))
