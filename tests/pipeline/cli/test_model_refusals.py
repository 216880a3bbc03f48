"""A model that cannot be pruned is refused as the user sees it: exit code 2, one line, nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from whole_runs import LENGTH, SAMPLES

from espalier.pipeline.cli.main import main
from espalier.stages.storage.headers import INDEX

pytestmark = pytest.mark.usefixtures("recorded")
Break = Callable[[Path], object]
UP = "model.layers.1.mlp.up_proj.weight"


def config(**values: Any) -> Break:
    def write(model: Path) -> None:
        file = model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return write


def weights(**tensors: torch.Tensor) -> Break:
    def write(model: Path) -> None:
        file = model / "model.safetensors"
        save_file(load_file(file) | tensors, file, {"format": "pt"})

    return write


def beside(name: str, text: str) -> Break:
    return lambda model: (model / name).write_text(text)


def replaced(name: str, by: Callable[[Path], object]) -> Break:
    def write(model: Path) -> None:
        (model / name).unlink()
        by(model / name)

    return write


ONE_FILE: dict[str, tuple[Break, str]] = {
    "more blocks than there are": (config(num_hidden_layers=6), "no tensor model.layers.4."),
    "no blocks": (config(num_hidden_layers=0), "num_hidden_layers 0: nothing to prune"),
    "another vocabulary": (config(vocab_size=200), "embed_tokens.weight is (128, 32), config.json says (200, 32)"),
    "heads that do not divide": (config(num_attention_heads=5), "32) is not a multiple of the number of attention"),
    "a width that is no number": (config(hidden_size="x"), "'hidden_size' expected int, got str"),
    "an activation that is none": (config(hidden_act="magic"), "makes no model of its config.json (KeyError('magic'))"),
    "a text_config that is a list": (config(text_config=[1]), "its text_config is not an object"),
    "JSON too deep to read": (beside("config.json", "[" * 100_000), "config.json: cannot be read"),
    "a tensor without elements": (weights(**{UP: torch.zeros(0, 32)}), f"{UP} is (0, 32)"),
    "a norm of integers": (weights(**{"model.norm.weight": torch.ones(32).long()}), "is stored as I64"),
    "fp8 without a word": (weights(**{UP: torch.ones(48, 32).to(torch.float8_e4m3fn)}), "is stored as F8_E4M3"),
    "fp8 by its config": (config(quantization_config={"quant_method": "fp8"}), "quantised by fp8; prune the original"),
    "quantised by ModelOpt": (
        beside("hf_quant_config.json", '{"quantization": {"quant_algo": "FP8"}}'),
        "quantised by ModelOpt's FP8",
    ),
    "an fp8 dtype": (config(dtype="float8_e4m3fn"), "dtype 'float8_e4m3fn' says that the weights are quantised"),
    "an adapter": (beside("adapter_config.json", "{}"), "an adapter (LoRA) of its base model"),
    "weights that are a folder": (replaced("model.safetensors", Path.mkdir), "a folder, not a file"),
    "weights that are a link to nothing": (
        replaced("model.safetensors", lambda path: path.symlink_to("nowhere")),
        "a link to what is not there",
    ),
    "weights elsewhere": (config(transformers_weights="../x.safetensors"), "is not the name of a file in"),
    "weights that the config alone knows": (config(transformers_weights="x.safetensors"), "x.safetensors: named in"),
    "an index that the config alone knows": (
        config(transformers_weights="x.safetensors.index.json"),
        "x.safetensors.index.json: named in",
    ),
    "a tokenizer that is none": (beside("tokenizer.json", "{"), "its tokenizer cannot be read"),
}


@pytest.fixture
def refused(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[Path], str]:
    def run(model: Path) -> str:
        output = tmp_path / "out"
        usual = ["prune", model, "--output", output, "--calibration", text, "--samples", SAMPLES, "--length", LENGTH]
        capsys.readouterr()  # what making the model said
        assert main([str(argument) for argument in usual]) == 2
        out, err = capsys.readouterr()
        [line] = [line for line in err.splitlines() if line.startswith("espalier: ")]
        assert err.endswith(line + "\n") and "Traceback" not in err and not out and not output.exists()
        return line

    return run


@pytest.mark.parametrize("what", ONE_FILE)
def test_a_model_that_cannot_be_pruned(refused: Callable[[Path], str], model: Path, what: str) -> None:
    spoil, said = ONE_FILE[what]
    spoil(model)
    assert said in refused(model)


def index(change: Callable[[dict[str, str], list[str]], object]) -> Break:
    def write(model: Path) -> None:
        written = json.loads((model / INDEX).read_text())
        change(written["weight_map"], sorted(path.name for path in model.glob("model-*.safetensors")))
        (model / INDEX).write_text(json.dumps(written))

    return write


SHARDED: dict[str, tuple[Break, str]] = {
    "an index that promises more": (index(lambda names, files: names.update(x=files[0])), "promises x in it"),
    "an index that puts a tensor elsewhere": (
        index(lambda names, files: names.update({UP: files[0]})),
        f"promises {UP}",
    ),
    "an index that leads out": (index(lambda names, files: names.update(x="/etc/passwd")), "not a safetensors index"),
    "an index in other capitals": (index(lambda names, files: names.update(x=files[0].upper())), "but missing"),
    "an index that is a folder": (replaced(INDEX, Path.mkdir), f"safetensors files but no {INDEX}"),
}


@pytest.mark.parametrize("what", SHARDED)
def test_a_model_in_pieces_that_cannot_be_pruned(
    refused: Callable[[Path], str], tiny_model: Callable[..., Path], tmp_path: Path, what: str
) -> None:
    model = Path(shutil.copytree(tiny_model(sharded=True), tmp_path / "sharded"))
    spoil, said = SHARDED[what]
    spoil(model)
    assert said in refused(model)
