"""Runs whose blocks are computed in another dtype than their weights are stored in: chosen once, recorded, kept."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from whole_runs import LENGTH, MICROBATCH, SAMPLES, Listener, weights_of

from espalier.cluster.connection.inventory import nodes, units_everywhere
from espalier.pipeline.cli.main import main
from espalier.pipeline.config.prune import PruneConfig
from espalier.pipeline.pruning.prune import prune, resume
from espalier.stages.devices import has_units

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("one_cluster", "recorded")]


class Enough(Exception):
    """Ends a run as an error would."""


@pytest.fixture
def asked(tmp_path: Path, tiny_model: Callable[..., Path], text: Path) -> Callable[..., PruneConfig]:
    def make(name: str, stored: str = "bfloat16", **more: Any) -> PruneConfig:
        usual = {"samples": SAMPLES, "length": LENGTH, "microbatch": MICROBATCH, "shards": 1, "calibration": str(text)}
        return PruneConfig(model=str(tiny_model(dtype=stored)), output=str(tmp_path / name), **(usual | more))

    return make


def dtypes_of(output: Path) -> set[torch.dtype]:
    return {tensor.dtype for file in output.glob("*.safetensors") for tensor in load_file(file).values()}


def test_a_resumed_run_goes_on_in_the_arithmetic_that_it_began_in(
    asked: Callable[..., PruneConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def units(there: bool) -> None:
        monkeypatch.setattr("espalier.pipeline.planning.placement.has_units", lambda dtype, device: there)

    def stop(block: int) -> None:
        raise Enough

    units(False)
    whole = prune(asked("whole"), Listener())
    with pytest.raises(Enough):
        prune(asked("cut"), Listener(on_block=stop))
    units(True)
    resumed = resume(tmp_path / "cut", shards=2, reporter=Listener())
    own = prune(asked("own"), Listener())
    assert [run.run["compute"] for run in (whole, resumed, own)] == ["fp32", "fp32", "bf16"]
    assert resumed.run["config"]["compute"] == "auto", "what was asked for stays what it was"
    assert weights_of(resumed.output) == weights_of(whole.output) != weights_of(own.output)
    assert dtypes_of(whole.output) == dtypes_of(own.output) == {torch.bfloat16}


def test_a_float16_checkpoint_is_an_ordinary_one(
    asked: Callable[..., PruneConfig], held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    result = prune(asked("half", "float16", eval=str(held_out)), Listener())
    assert result.run["compute"] == ("fp16" if has_units(torch.float16, "cpu") else "fp32")
    assert result.perplexity and math.isfinite(result.perplexity)
    assert dtypes_of(result.output) == {torch.float16}
    model = AutoModelForCausalLM.from_pretrained(result.output)
    assert model.dtype == torch.float16 and all(torch.isfinite(p).all() for p in model.parameters())
    capsys.readouterr()  # loading the model by hand can import DeepSpeed, whose first word goes to stdout
    perplexities = {}
    for compute in ("fp32", "bf16"):
        options = ["--data", held_out, "--length", LENGTH, "--shards", 1, "--microbatch", MICROBATCH]
        command = ["eval", result.output, *options, "--against", result.run["config"]["model"], "--compute", compute]
        assert main([str(argument) for argument in [*command, "--json"]]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["compute"] == compute
        perplexities[compute] = shown["perplexity"]
    assert perplexities["fp32"] == pytest.approx(result.perplexity, rel=1e-5)
    assert perplexities["fp32"] != perplexities["bf16"] == pytest.approx(result.perplexity, rel=2e-2)


def test_the_nodes_of_a_cluster_are_asked_for_their_units() -> None:
    places = [node.node_id for node in nodes()]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert units_everywhere(dtype, "cpu", places) == has_units(dtype, "cpu")
    assert units_everywhere(torch.bfloat16, "cpu", []), "nobody lacks them"
