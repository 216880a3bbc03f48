"""Whole runs on a checkpoint as people have them: odd, read-only, with more in it than the model reads."""

import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from streaming import same_bits
from torch import Tensor
from transformers import AutoModelForCausalLM
from whole_runs import LENGTH, MICROBATCH, SAMPLES, Listener

from espalier.cluster.rank_group import RankGroup
from espalier.pipeline.cli.main import main
from espalier.pipeline.config.retrain import RetrainConfig
from espalier.pipeline.retraining.run import retrain
from espalier.pipeline.run.export import sparsity_of
from espalier.stages.storage.hf_checkpoint import Checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("one_cluster", "recorded")]
BLOCKS = 4
EXTRA = {
    f"model.layers.{BLOCKS}.eh_proj.weight": torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).half(),
    f"model.layers.{BLOCKS}.shared_head.norm.weight": torch.tensor([float("nan"), 1.0]),
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(4, dtype=torch.float64),
    "steps": torch.tensor(7),
}


@pytest.fixture
def odd(model: Path) -> Iterator[Path]:
    """A tiny Llama with more tensors than it reads, an index that no longer holds, a dtype as older tools wrote it, a
    template in a folder; nobody may write to it, and its files are links."""
    save_file(load_file(model / "model.safetensors") | EXTRA, model / "model.safetensors", {"format": "pt"})
    stale = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(stale))
    save_file({"model.norm.weight": torch.zeros(32)}, model / "model-00001-of-00001.safetensors")
    config = json.loads((model / "config.json").read_text()) | {"torch_dtype": "torch.float32"}
    del config["dtype"]
    (model / "config.json").write_text(json.dumps(config))
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (blobs := model.with_name("blobs")).mkdir()
    for number, path in enumerate(sorted(path for path in model.iterdir() if path.is_file())):
        path.chmod(0o400)
        path.rename(blobs / str(number))
        path.symlink_to(Path("..") / "blobs" / str(number))
    model.chmod(0o500)
    yield model
    model.chmod(0o700)


def tensors_of(directory: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(directory)
    return checkpoint.copies(checkpoint.entries)


def wrong_modes(directory: Path) -> dict[str, str]:
    """What under `directory` others could not read where the umask lets them, with its mode."""
    umask = os.umask(0o022)
    os.umask(umask)
    return {
        str(path): oct(mode)
        for path in [directory, *directory.rglob("*")]
        if (mode := stat.S_IMODE(path.stat().st_mode)) != (0o777 if path.is_dir() else 0o666) & ~umask
    }


def test_nothing_is_lost_by_pruning(odd: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    usual = ["prune", odd, "--output", output, "--calibration", text, "--samples", SAMPLES, "--length", LENGTH]
    more = ["--eval", text, "--reconstruct", "none", "--microbatch", MICROBATCH, "--shards", 2, "--json"]
    assert main([str(argument) for argument in [*usual, *more]]) == 0
    told = json.loads(capsys.readouterr().out)
    lines = [line for line in told["warnings"] if "copied unchanged" in line or "not read" in line]
    assert len(lines) == 2 and "4 tensors" in lines[0] and "model-00001-of-00001.safetensors" in lines[1]
    assert all(line in (output / "espalier" / "report.md").read_text() for line in lines)
    before, after = tensors_of(odd), tensors_of(output)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert same_bits(after[name], tensor) == (not name.endswith("_proj.weight") or name in EXTRA), name
    loaded = AutoModelForCausalLM.from_pretrained(output).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in loaded.items())
    assert (output / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
    assert json.loads((output / "config.json").read_text())["torch_dtype"] == "float32"
    assert sparsity_of(output) == 0.5
    assert wrong_modes(output) == {}


def test_nothing_is_lost_by_training(odd: Path, text: Path, tmp_path: Path, two_ranks: RankGroup) -> None:
    request = RetrainConfig(
        model=str(odd), output=str(tmp_path / "out"), data=str(text), steps=2, batch=2, length=LENGTH, shadow=True
    )
    result = retrain(request, Listener(), two_ranks)
    assert sum("4 tensors" in line for line in result.run["warnings"]) == 1
    before, after = tensors_of(odd), tensors_of(result.output)
    assert before.keys() == after.keys()
    assert all(same_bits(after[name], tensor) for name, tensor in EXTRA.items())
    loaded = AutoModelForCausalLM.from_pretrained(result.output).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in loaded.items())
    assert not torch.equal(after["model.norm.weight"], before["model.norm.weight"])
    assert wrong_modes(result.output) == {}


def test_the_model_s_own_directory_is_no_output(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(model, model.with_name("before"))
    assert main(["prune", str(model), "--output", str(model), "--calibration", str(text)]) == 2
    assert f"output {model}: " in capsys.readouterr().err
    assert sorted(path.name for path in model.iterdir()) == sorted(p.name for p in model.with_name("before").iterdir())
