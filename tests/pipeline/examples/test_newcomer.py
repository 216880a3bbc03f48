"""The commands of the project's README, given as they stand there."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from whole_runs import write_text

ROOT = Path(__file__).resolve().parents[3]


def commands_under(heading: str) -> list[list[str]]:
    """The command lines of `espalier` in the first block under a heading of README.md."""
    block = (ROOT / "README.md").read_text().partition(f"\n## {heading}\n")[2].split("```")[1]
    lines = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
    return [line[1:] for line in lines if line[:1] == ["espalier"]]


@pytest.mark.ray
@pytest.mark.slow
def test_a_newcomers_commands_work_as_they_stand_in_the_readme(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_model(), tmp_path / "llama")
    for seed, (name, characters) in enumerate({"text": 60_000, "held-out": 2000, "other": 2000}.items()):
        write_text(tmp_path / f"{name}.txt", characters, seed)
    commands = commands_under("Prune your own model") + commands_under("Compare")
    assert [command[0] for command in commands] == ["doctor", "plan", "prune", "eval", "compare"]
    surroundings = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    for command in commands:
        given = [sys.executable, "-m", "espalier", *command]
        done = subprocess.run(
            given, cwd=tmp_path, env=surroundings, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, (command, done.stderr)
    assert (tmp_path / "llama-50" / "espalier" / "report.md").exists() and (tmp_path / "comparison").is_dir()
    weight = AutoModelForCausalLM.from_pretrained(tmp_path / "llama-50").model.layers[0].mlp.up_proj.weight
    assert torch.count_nonzero(weight) == weight.numel() // 2
