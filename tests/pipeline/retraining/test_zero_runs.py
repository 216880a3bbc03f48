"""Whole training runs on ZeRO ranks: the losses of one plain process, exact zeros, killed and resumed."""

import json
import os
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from whole_runs import Listener, recorded_outside_the_table

from espalier.cluster.rank_group import RankGroup
from espalier.pipeline.config.retrain import RetrainConfig
from espalier.pipeline.record.recorder import default_tracking_uri
from espalier.pipeline.retraining.run import RetrainResult, resume, retrain
from espalier.pipeline.run.stopping import how_to_go_on
from espalier.stages.data.token_table import TokenTable
from espalier.stages.data.training_batches import Order
from espalier.stages.training.lr_schedule import rate_at
from espalier.stages.training.model import load_model

pytestmark = [pytest.mark.ray, pytest.mark.slow]
STEPS, BATCH, LENGTH, PEAK = 20, 4, 32, 3e-3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, database: str) -> Iterator[Path]:
    """A directory to work in; runs are recorded in the session's database."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", database)
        yield tmp_path_factory.mktemp("retrain")


@pytest.fixture(scope="module")
def pruned(tiny_model: Callable[..., Path], place: Path) -> Path:
    """A tiny Llama without half of the weights of each of its blocks' matrices."""
    directory = Path(shutil.copytree(tiny_model(blocks=2), place / "pruned"))
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".layers." in name and parameter.dim() > 1:
                parameter.masked_fill_(parameter.abs() < parameter.abs().median(), 0)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def request_to_train(place: Path, pruned: Path, text: Path, held_out: Path) -> Callable[..., RetrainConfig]:
    """make(name, **options) -> a small masked run into place/name."""

    def make(name: str, **options: Any) -> RetrainConfig:
        usual: dict[str, Any] = {
            "model": str(pruned),
            "output": str(place / name),
            "data": str(text),
            "eval": str(held_out),
            "masked": True,
            "steps": STEPS,
            "batch": BATCH,
            "microbatch": 2,
            "length": LENGTH,
            "learning_rate": PEAK,
            "warmup": 2,
            "weight_decay": 0.1,
        }
        return RetrainConfig(**(usual | options))

    return make


@pytest.fixture(scope="module")
def run_in(two_ranks: RankGroup, request_to_train: Callable[..., RetrainConfig]) -> Callable[..., RetrainResult]:
    """run(zero_stage, **options) -> its result, run once a module."""

    @cache
    def run(zero_stage: int, **options: Any) -> RetrainResult:
        name = " ".join(["stage", str(zero_stage), *(f"{option} {value}" for option, value in options.items())])
        return retrain(request_to_train(name, zero_stage=zero_stage, **options), Listener(), two_ranks)

    return run


@pytest.fixture(scope="module")
def plain_losses(pruned: Path, run_in: Callable[..., RetrainResult]) -> list[float]:
    """Of one process, one batch a step, torch's own Adam; the mask applied to gradients by hand."""
    table = TokenTable.open(run_in(1).output / "espalier" / "tokens-training.arrow")
    model = load_model(pruned, torch.float32, seed=0)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    keep = [parameter.detach() != 0 for parameter in matrices]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}])
    order, losses = Order(len(table), BATCH, seed=0), []
    for step in range(STEPS):
        ids = torch.tensor([table.rows(row, row + 1)[0].tolist() for row in order.step(step)])
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        for parameter, kept in zip(matrices, keep, strict=True):
            assert parameter.grad is not None
            parameter.grad.mul_(kept)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, peak=PEAK, schedule="cosine", warmup=2, steps=STEPS)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def assert_zeros_are_those_of(pruned: Path, trained: Path) -> None:
    before, after = weights(pruned), weights(trained)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor == 0, after[name] == 0), name
        assert not torch.equal(tensor.to(after[name].dtype), after[name]), name


def largest_gap(first: list[float], second: list[float]) -> float:
    assert len(first) == len(second)
    return max(abs(one - other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(("zero_stage", "options"), [(1, {}), (2, {}), (3, {}), (3, {"offload": True})])
def test_losses_are_those_of_one_plain_process_and_zeros_stay(
    zero_stage: int,
    options: dict[str, Any],
    run_in: Callable[..., RetrainResult],
    plain_losses: list[float],
    pruned: Path,
) -> None:
    result = run_in(zero_stage, **options)
    assert largest_gap(result.losses, plain_losses) < 1e-3
    assert plain_losses[-1] < plain_losses[0] - 0.1
    assert_zeros_are_those_of(pruned, result.output)


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_activation_checkpointing_changes_no_bit(zero_stage: int, run_in: Callable[..., RetrainResult]) -> None:
    usual, again = run_in(zero_stage), run_in(zero_stage, activation_checkpointing=True)
    assert again.losses == usual.losses and again.evaluations == usual.evaluations
    before, after = weights(usual.output), weights(again.output)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_stage_three_keeps_half_of_what_stage_zero_does(run_in: Callable[..., RetrainResult]) -> None:
    held = {stage: run_in(stage, **({} if stage else {"steps": 1})).run["memory"] for stage in (0, 3)}
    for rank in range(2):
        for kind in ("parameters", "optimizer"):
            assert held[3][rank][kind] == pytest.approx(held[0][rank][kind] / 2, rel=0.01), kind
    elements = sum(tensor.numel() for tensor in weights(run_in(3).output).values())
    assert held[0][0]["parameters"] == 4 * elements


def test_the_result_is_a_plain_checkpoint_whose_loss_is_what_was_said(run_in: Callable[..., RetrainResult]) -> None:
    result = run_in(2)
    model = AutoModelForCausalLM.from_pretrained(result.output)
    table = TokenTable.open(result.output / "espalier" / "tokens-evaluation.arrow")
    ids = torch.from_numpy(table.rows(0, len(table)).copy()).long()
    with torch.no_grad():
        assert result.loss == pytest.approx(float(model(input_ids=ids, labels=ids).loss), abs=1e-5)
    assert {path.name for path in result.output.iterdir()} == {
        *("config.json", "espalier", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert not list((result.output / "espalier").glob("checkpoint-*"))


def test_what_it_took_is_told_by_phase_and_the_report_can_be_read(run_in: Callable[..., RetrainResult]) -> None:
    run = run_in(2).run
    seconds, flops = run["seconds"], run["flops"]
    assert 0 < seconds["steps"] <= seconds["train"] <= seconds["total"] and "track" not in seconds
    facts = run["model"]
    weights_a_token = facts["prunable"] + 128 * 32  # and the head, vocabulary x width
    assert flops == {"steps": pytest.approx(6 * run["tokens"] * weights_a_token, rel=0.2)}  # attention is the rest
    report = Path(run["report"]).read_text()
    assert "was trained in float32 for" in report
    assert f"{run['loss']:.4f}" in report and "ZeRO stage 2 on 2 ranks" in report and "optimizer steps" in report
    assert run["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert (Path(run["report"]).parent / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_the_curve_is_in_mlflow(run_in: Callable[..., RetrainResult]) -> None:
    from espalier.pipeline.record.mlflow_client import open_client

    result = run_in(1)
    assert result.run_id is not None
    client = open_client(default_tracking_uri())
    curve = client.get_metric_history(result.run_id, "train/loss")
    assert [point.value for point in sorted(curve, key=lambda point: point.step)] == result.losses
    assert recorded_outside_the_table(result.output / "espalier") == set()
    (evaluated,) = client.get_metric_history(result.run_id, "eval/loss")
    assert (evaluated.step, evaluated.value) == (STEPS, result.loss)


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_bf16_keeps_zeros_and_follows_float32(
    zero_stage: int, run_in: Callable[..., RetrainResult], plain_losses: list[float], pruned: Path
) -> None:
    result = run_in(zero_stage, dtype="bfloat16")
    assert_zeros_are_those_of(pruned, result.output)
    assert weights(result.output)["lm_head.weight"].dtype == torch.bfloat16
    assert largest_gap(result.losses, plain_losses) < 0.05


def test_a_killed_rank_costs_a_restart_and_the_losses_are_the_same(
    two_ranks: RankGroup, run_in: Callable[..., RetrainResult], request_to_train: Callable[..., RetrainConfig]
) -> None:
    class Killer(Listener):
        def note(self, text: str) -> None:
            super().note(text)
            if text.startswith("step 10/") and not any("lost" in note for note in self.notes):
                os.kill(two_ranks.facts[1]["pid"], signal.SIGKILL)

    listener, uninterrupted = Killer(), run_in(2)
    config = request_to_train("killed", zero_stage=2, checkpoint_every=5, eval_every=5)
    two_ranks.on_event = listener.note
    result = retrain(config, listener, two_ranks)
    assert sum("a rank was lost" in note for note in listener.notes) == 1
    assert any(note.startswith("going on after step") for note in listener.notes)
    assert result.losses == uninterrupted.losses
    assert [step for step, _ in result.evaluations] == [5, 10, 15, 20]
    assert result.evaluations[-1][1] == uninterrupted.loss
    ours, theirs = weights(result.output), weights(uninterrupted.output)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.fixture(scope="module")
def one_rank(one_cluster: None) -> Iterator[RankGroup]:
    with RankGroup(1) as ranks:
        yield ranks


def test_importances_are_the_same_on_one_rank_and_on_two(
    two_ranks: RankGroup, one_rank: RankGroup, request_to_train: Callable[..., RetrainConfig]
) -> None:
    shadows = []
    for name, ranks in (("two", two_ranks), ("one", one_rank)):
        # Two micro-batches of two: their gradients are halved and summed, which is exact in either order.
        config = request_to_train(name, zero_stage=3, steps=6, clip=0, shadow=True, shadow_every=2)
        shadows.append(weights(retrain(config, Listener(), ranks).output / "shadow"))
    assert shadows[0].keys() == shadows[1].keys()
    for name, importance in shadows[0].items():
        assert importance.min() >= 0 and importance.max() > 0
        assert torch.equal(importance, shadows[1][name]), name


def test_a_run_goes_on_with_other_ranks_in_another_stage(
    two_ranks: RankGroup,
    one_rank: RankGroup,
    run_in: Callable[..., RetrainResult],
    request_to_train: Callable[..., RetrainConfig],
    pruned: Path,
) -> None:
    class Interrupted(Listener):
        def note(self, text: str) -> None:
            if text.startswith("step 15/"):
                raise KeyboardInterrupt

    uninterrupted = run_in(3)
    options = {"checkpoint_every": 5, "eval_every": 5, "shadow": True, "shadow_dtype": "bf16", "shadow_every": 3}
    config = request_to_train("moved", zero_stage=3, **options)
    with pytest.raises(KeyboardInterrupt):
        retrain(config, Interrupted(), two_ranks)
    listener = Listener()
    result = resume(Path(config.output), listener, one_rank, changes={"ranks": 1, "zero_stage": 1})
    assert any(note.startswith("going on after step 10") for note in listener.notes)
    assert result.losses[:10] == uninterrupted.losses[:10]
    assert largest_gap(result.losses, uninterrupted.losses) < 1e-3
    assert [step for step, _ in result.evaluations] == [5, 10, 15, 20]
    assert_zeros_are_those_of(pruned, result.output)
    assert len(weights(result.output / "shadow")) == len(weights(pruned))


LATE = {  # what the driver calls between the last checkpoint and the end -> what is where then
    "copy_companions": "the whole model is consolidated, and nothing of it in the output",
    "sparsity_of": "it is in the output",
    "write_report": "run.json holds all results",
}


@pytest.mark.parametrize("moment", LATE)
def test_a_run_that_is_interrupted_after_its_last_step_is_resumed_to_the_same_end(
    moment: str,
    two_ranks: RankGroup,
    run_in: Callable[..., RetrainResult],
    request_to_train: Callable[..., RetrainConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    uninterrupted = run_in(2)
    config = request_to_train(f"late {moment}", zero_stage=2)
    with monkeypatch.context() as patch:
        patch.setattr(f"espalier.pipeline.retraining.run.{moment}", interrupted)
        with pytest.raises(KeyboardInterrupt) as stop:
            retrain(config, Listener(), two_ranks)
    assert how_to_go_on(stop.value) == f"`espalier resume {shlex.quote(config.output)}` goes on"
    assert json.loads((Path(config.output) / "espalier" / "run.json").read_text())["status"] == "interrupted"
    (Path(config.output) / "espalier" / "journal.jsonl").write_text("")  # as if the last evaluation was not heard of
    result = resume(Path(config.output), Listener(), two_ranks)
    assert result.losses == uninterrupted.losses and result.evaluations == uninterrupted.evaluations
    assert result.run["memory"] == uninterrupted.run["memory"]
    ours, theirs = weights(result.output), weights(uninterrupted.output)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert Path(result.run["report"]).is_file() and result.run["status"] == "finished"
    assert not list((result.output / "espalier").glob("checkpoint-*"))
