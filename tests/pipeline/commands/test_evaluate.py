"""KL and top-1 agreement of a whole run, against whole models in transformers; those of two models that have heads of
their own are in tests/stages/metrics/test_perplexity.py."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from whole_runs import LENGTH, Listener

from espalier.pipeline.pruning.prune import prune

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("one_cluster", "recorded")]


def apart(dense: Path, other: Path, text: Path) -> tuple[float, float]:
    """(KL(dense || other) in nats a token, share of the same likeliest tokens) by whole models, float64 log-softmax."""
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([ord(character) for character in text.read_text()])
    windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (dense, other)]
    with torch.no_grad():
        p, q = (model(windows).logits[:, :-1].double().log_softmax(-1) for model in models)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    return float(kl), float((p.argmax(-1) == q.argmax(-1)).double().mean())


def test_a_run_compares_with_the_dense_model_even_when_what_was_kept_of_it_is_gone(
    request_for: Any, held_out: Path
) -> None:
    config = request_for(eval=str(held_out), shards=2)
    states = Path(config.output) / "espalier" / "scratch" / "dense-states"
    kept: list[int] = []

    def lose(block: int) -> None:
        kept.append(len(list(states.glob("*.safetensors"))))
        shutil.rmtree(states, ignore_errors=True)

    result = prune(config, Listener(on_block=lose))
    assert kept == [-(-500 // LENGTH // 2), 0, 0, 0], "one file a microbatch, before it was lost"
    kl, agreement = apart(Path(config.model), result.output, held_out)
    assert kl > 0.01 and result.kl == pytest.approx(kl, rel=1e-4)
    assert result.top1_agreement == pytest.approx(agreement, abs=1e-9) and 0 < agreement < 1
    assert result.run["kl"] == result.kl and result.summary()["top1_agreement"] == agreement
    report = (result.output / "espalier" / "report.md").read_text()
    assert f"{result.kl:.4f}" in report and "most likely token" in report
