"""What is told of a model before anything is begun, by every command that reads it: the same, through one door."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from whole_runs import Listener, add_tokenizer

from espalier.pipeline.cli.main import main
from espalier.pipeline.commands.evaluate import evaluate
from espalier.pipeline.config.prune import EvalConfig
from espalier.pipeline.config.retrain import RetrainConfig
from espalier.pipeline.retraining.plan import inspect
from espalier.stages.errors import Refusal

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 128, "pad_token_id": 0}
NEW = "helium: new here; a small random model of it, 2 blocks, was "


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def of_family(tmp_path: Path) -> Callable[..., Path]:
    """make(family, **settings) -> a small random checkpoint of it, with one tensor more than it reads."""

    def make(family: str, **settings: Any) -> Path:
        config = AutoConfig.for_model(family, **SIZES, **settings)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory := tmp_path / family)
        file = directory / "model.safetensors"
        save_file(load_file(file) | {"steps": torch.tensor(7)}, file, {"format": "pt"})
        add_tokenizer(directory)
        return directory

    return make


@pytest.fixture
def helium(of_family: Callable[..., Path]) -> Path:
    return of_family("helium", intermediate_size=48, num_key_value_heads=1, head_dim=16)


def test_eval_tells_what_prune_tells_once_for_both_models(helium: Path, text: Path) -> None:
    listener = Listener()
    asked = EvalConfig(model=str(helium), against=str(helium), data=str(text), length=32, address="127.0.0.1:1")
    with pytest.raises(Refusal, match="cannot be reached"):
        evaluate(asked, listener)
    warnings = [note for note in listener.notes if note.startswith("warning: ")]
    assert len(warnings) == 2
    assert warnings[0].startswith("warning: 1 tensor that HeliumForCausalLM does not read") and "steps" in warnings[0]
    assert warnings[1] == f"warning: {NEW}streamed, pruned and loaded back exactly"


def test_plan_tries_what_prune_would_and_refuses_as_it_does(
    helium: Path, of_family: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(helium / "config.json")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"warning: {NEW}streamed" in shown and "does not read" in shown
    assert main(["plan", str(of_family("bloom"))]) == 2
    refusal = capsys.readouterr().err
    assert "model family 'bloom' is not supported: looking at how it calls its components failed" in refusal


def test_retrain_asks_of_a_family_what_training_needs(
    helium: Path, of_family: Callable[..., Path], capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path
) -> None:
    def remarks(model: Path) -> tuple[str, ...]:
        facts, _ = inspect(RetrainConfig(model=str(model), output="-", data="-", length=32))
        return facts.remarks

    assert f"{NEW}trained, and loaded tensor by tensor" in remarks(helium)
    assert any(line.startswith("bloom: new here") for line in remarks(of_family("bloom")))
    encoder = of_family("bert-generation", intermediate_size=48)
    assert main(["retrain", str(encoder), "--output", str(tmp_path / "out"), "--data", str(text)]) == 2
    assert "predicting the next token failed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
