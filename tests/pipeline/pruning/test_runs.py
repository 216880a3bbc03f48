"""Whole runs: a plain checkpoint with exact zeros, the same bytes however they were made, and a whole record."""

import io
import json
import math
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import family_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from whole_runs import (
    LENGTH,
    MICROBATCH,
    SAMPLES,
    Listener,
    add_tokenizer,
    prune_without_ray,
    recorded_outside_the_table,
    weights_of,
)

from espalier.pipeline.cli.main import main
from espalier.pipeline.config.prune import PruneConfig
from espalier.pipeline.pruning.prune import SUMMARY, PruneResult, prune

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("one_cluster", "recorded")]
EXPERIMENT = "whole runs"


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, through its index if it has one."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return load_file(directory / "model.safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    tensors = {}
    for name, file in weight_map.items():
        with safe_open(directory / file, framework="pt") as handle:
            tensors[name] = handle.get_tensor(name)
    return tensors


def perplexity_of(directory: Path, text: Path) -> float:
    """Perplexity by the whole model in transformers: windows of LENGTH, every token but the first of each."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    ids = torch.tensor([ord(character) for character in text.read_text()])
    windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    with torch.no_grad():
        logits = torch.cat([model(window[None]).logits.float() for window in windows])
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), windows[:, 1:].reshape(-1))
    return math.exp(loss)


def is_prunable(name: str) -> bool:
    return name.endswith("_proj.weight")


def check_untouched(dense: Path, pruned: Path) -> None:
    """Names, shapes and dtypes are the dense ones; so are, bit for bit, the tensors that are not pruned."""
    before, after = tensors_of(dense), tensors_of(pruned)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and after[name].shape == tensor.shape
        if "layers" not in name:
            assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.fixture(scope="module")
def wanda(
    one_cluster: None,
    tiny_model: Callable[..., Path],
    text: Path,
    held_out: Path,
    database: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> PruneResult:
    """Half of each row by Wanda, reconstructed, evaluated, on two shards: the run that most tests here look at."""
    config = PruneConfig(
        model=str(tiny_model()),
        output=str(tmp_path_factory.mktemp("wanda") / "out"),
        calibration=str(text),
        eval=str(held_out),
        samples=SAMPLES,
        length=LENGTH,
        microbatch=MICROBATCH,
        criterion="wanda",
        reconstruct="component",
        shards=2,
        experiment=EXPERIMENT,
        run_name="reconstructed",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", database)
        return prune(config, Listener())


# -- the checkpoint ----------------------------------------------------------------------------------------------------


def test_it_loads_in_transformers_with_the_perplexity_that_the_run_reports(wanda: PruneResult, held_out: Path) -> None:
    dense = perplexity_of(Path(wanda.run["config"]["model"]), held_out)
    assert wanda.perplexity == pytest.approx(perplexity_of(wanda.output, held_out), rel=1e-5)
    assert wanda.dense_perplexity == pytest.approx(dense, rel=1e-5)
    assert wanda.perplexity != pytest.approx(dense, rel=1e-3)


def test_half_of_every_row_is_exactly_zero_and_what_is_not_pruned_is_untouched(wanda: PruneResult) -> None:
    dense = Path(wanda.run["config"]["model"])
    check_untouched(dense, wanda.output)
    for name, tensor in tensors_of(wanda.output).items():
        if is_prunable(name):
            assert ((tensor == 0).sum(1) == tensor.shape[1] // 2).all(), name
            assert not torch.signbit(tensor[tensor == 0]).any(), "zeros are +0"
    assert wanda.sparsity == 0.5


def test_the_directory_holds_the_checkpoint_the_record_and_nothing_else(wanda: PruneResult) -> None:
    blocks = [f"model-block-{block:05d}.safetensors" for block in range(4)]
    companions = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    weights = [*blocks, "model-ends-00000.safetensors", "model.safetensors.index.json"]
    assert sorted(path.name for path in wanda.output.iterdir()) == sorted([*weights, *companions, "espalier"])
    home = {path.name for path in (wanda.output / "espalier").iterdir()}
    assert {"run.json", "report.md", "journal.jsonl", "metrics.jsonl"} <= home and "scratch" not in home


def test_the_bytes_are_those_of_one_plain_shard(wanda: PruneResult, request_for: Any, tmp_path: Path) -> None:
    assert weights_of(wanda.output) == prune_without_ray(request_for(output=str(tmp_path / "plain")))


def test_what_goes_from_block_to_block_goes_from_shard_to_shard(
    request_for: Any, held_out: Path, tmp_path: Path
) -> None:
    """Gemma 3n: the second shard's blocks read keys and values of the first's; their own, unread, stay as they are."""
    model = family_checkpoint(tmp_path)("gemma3n_text", "float32")
    add_tokenizer(model)
    unread = {"model.layers.3.self_attn.k_proj.weight": torch.randn(16, 32)}
    save_file(load_file(model / "model.safetensors") | unread, model / "model.safetensors", {"format": "pt"})
    result = prune(request_for(model=model, shards=2, bos="none", eval=str(held_out)), Listener())
    check_untouched(model, result.output)
    assert torch.equal(tensors_of(result.output)[next(iter(unread))], *unread.values())
    assert result.sparsity == 0.5
    assert result.perplexity == pytest.approx(perplexity_of(result.output, held_out), rel=1e-5)
    assert result.dense_perplexity == pytest.approx(perplexity_of(model, held_out), rel=1e-5)
    plain = request_for(model=model, bos="none", output=str(tmp_path / "plain"))
    assert weights_of(result.output) == prune_without_ray(plain)


@pytest.mark.parametrize(
    "how",
    [
        {"shards": 3, "window": 1},
        {"shards": 2, "window": 4, "resident": "one", "spool_memory": 0},
    ],
    ids=["three shards, window 1", "one block at a time, activations on disk"],
)
def test_the_bytes_do_not_depend_on_shards_window_or_memory(
    wanda: PruneResult, request_for: Any, how: dict[str, Any]
) -> None:
    result = prune(request_for(**how), Listener())
    assert weights_of(result.output) == weights_of(wanda.output)
    assert len(result.run["shards"]) == how["shards"]
    assert result.run["estimate"]["resident"] == how.get("resident", "all")


def test_a_tied_bf16_checkpoint_in_many_files_comes_out_2_of_4_with_one_json_object_on_stdout(
    tiny_model: Callable[..., Path], text: Path, held_out: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dense = tiny_model(family="qwen3", dtype="bfloat16", tied=True, sharded=True)
    recipe = ["--pattern", "2:4", "--criterion", "magnitude", "--reconstruct", "none", "--experiment", EXPERIMENT]
    sizes = ["--samples", SAMPLES, "--length", LENGTH, "--shards", 1, "--run-name", "two of four"]
    arguments = ["prune", dense, "--output", "out", "--calibration", text, "--eval", held_out, *recipe, *sizes]
    assert main([str(argument) for argument in [*arguments, "--json"]]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert out.count("\n") == 1 and "4/4 blocks" in err and "stream " in err
    assert set(result) == set(SUMMARY)
    assert result["output"] == str(tmp_path / "out") and result["sparsity"] == 0.5 and len(result["blocks"]) == 4

    check_untouched(dense, tmp_path / "out")
    for name, tensor in tensors_of(tmp_path / "out").items():
        if is_prunable(name):
            groups = tensor.view(len(tensor), -1, 4)
            assert ((groups == 0).sum(2) == 2).all(), name
            original = tensors_of(dense)[name].view_as(groups)
            assert torch.equal(groups, torch.where(groups != 0, original, 0)), "what is kept is as it was"
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    assert result["perplexity"] == pytest.approx(perplexity_of(tmp_path / "out", held_out), rel=2e-2)  # bf16 batches

    assert main([str(argument) for argument in arguments]) == 2
    assert "holds a finished run" in capfd.readouterr().err


# -- the record --------------------------------------------------------------------------------------------------------


def test_run_json_has_everything_and_the_estimate_beside_the_actual(wanda: PruneResult) -> None:
    run = json.loads((wanda.output / "espalier" / "run.json").read_text())
    assert run == json.loads(json.dumps(wanda.run)) and set(SUMMARY) <= set(run)
    assert run["status"] == "finished" and run["warnings"] == []
    assert run["read"]["calibration"] == "calibration text text.txt: read as plain text; no BOS"
    assert run["read"]["evaluation"].startswith("evaluation text held-out.txt: read as plain text")
    assert run["read"]["calibration"] in (wanda.output / "espalier" / "report.md").read_text()
    assert {"tokens", "connect", "load", "stream", "work", "assemble", "evaluate", "total"} <= set(run["seconds"])
    assert [(shard["first"], shard["last"]) for shard in run["shards"]] == [(0, 1), (2, 3)]
    assert all(shard["device"] == "cpu" and shard["node"] for shard in run["shards"])
    assert len(run["peak_memory"]["shards"]) == len(run["estimate"]["shards"]) == 2
    assert all(peak > 50e6 for peak in [*run["peak_memory"]["shards"], run["peak_memory"]["driver"]])
    assert all(estimate["peak"] > estimate["weights"] > 0 for estimate in run["estimate"]["shards"])
    for number, block in enumerate(run["blocks"]):
        assert block["block"] == number and block["tokens"] == SAMPLES * LENGTH
        assert [unit["name"] for unit in block["units"]] == ["self_attn", "mlp"]
        assert all(unit["error_after"] <= unit["error_before"] for unit in block["units"])
    assert {entry["shard"] for entry in run["timeline"]} == {0, 1}


def test_the_mlflow_run_is_complete(wanda: PruneResult, recorded: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=recorded)
    run = client.get_run(wanda.run["mlflow_run_id"])
    assert run.info.status == "FINISHED" and run.info.run_name == "reconstructed"
    assert client.get_experiment(run.info.experiment_id).name == EXPERIMENT
    expected = {"criterion": "wanda", "sparsity": "0.5", "shards": "2", "blocks": "4", "length": str(LENGTH)}
    assert expected.items() <= run.data.params.items()
    for metric in ("self_attn/error_before", "mlp/error_after", "block/sparsity", "block/seconds", "block/gflops"):
        assert sorted(point.step for point in client.get_metric_history(run.info.run_id, metric)) == [0, 1, 2, 3]
    assert run.data.metrics["perplexity"] == wanda.perplexity and run.data.metrics["kl"] == wanda.kl
    assert run.data.metrics["sparsity"] == 0.5 and run.data.metrics["seconds/total"] > 0
    assert recorded_outside_the_table(wanda.output / "espalier") == set()
    artifacts = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"run.json", "report.md"} <= artifacts and len(artifacts) >= 3, "plots as well"


def test_a_tracking_server_that_is_down_costs_a_warning_and_not_the_run(
    wanda: PruneResult, request_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{bound.getsockname()[1]}")
        listener = Listener()
        result = prune(request_for(), listener)
    assert weights_of(result.output) == weights_of(wanda.output)
    assert result.run["mlflow_run_id"] is None
    (warning,) = result.run["warnings"]
    assert "connection refused" in warning and f"warning: {warning}" in listener.notes
    steps = [
        json.loads(line)["step"] for line in (result.output / "espalier" / "metrics.jsonl").read_text().splitlines()
    ]
    assert {0, 1, 2, 3} <= set(steps)


# -- looking at it -----------------------------------------------------------------------------------------------------


def test_eval_measures_the_same_perplexity_and_the_distance_to_the_dense_model(
    wanda: PruneResult, held_out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", held_out, "--against", wanda.run["config"]["model"], "--length", LENGTH, "--shards", 1]
    assert main([str(argument) for argument in ["eval", wanda.output, *options, "--microbatch", 2, "--json"]]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["perplexity"] == pytest.approx(wanda.perplexity, rel=1e-6)
    assert result["against_perplexity"] == pytest.approx(wanda.dense_perplexity, rel=1e-6)
    assert wanda.perplexity and wanda.dense_perplexity
    assert result["log_perplexity_gap"] == pytest.approx(math.log(wanda.perplexity / wanda.dense_perplexity), rel=1e-4)
    assert (result["kl"], result["top1_agreement"]) == (pytest.approx(wanda.kl, rel=1e-4), wanda.top1_agreement)
    assert result["sparsity"] == 0.5 and result["windows"] == 500 // LENGTH


def test_compare_puts_the_finished_runs_of_the_experiment_side_by_side(
    wanda: PruneResult, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", EXPERIMENT, "--out", "comparison", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    (row,) = [row for row in result["runs"] if row["run"] == "reconstructed"]
    assert row["compute"] == wanda.run["compute"] == "fp32"
    assert row["perplexity"] == wanda.perplexity and row["sparsity"] == 0.5 and row["status"] == "FINISHED"
    assert {Path(file).name for file in result["files"]} == {"compare.md", "compare.csv", "perplexity.png"}
    assert all(Path(file).stat().st_size > 0 for file in result["files"])


def test_the_table_for_a_person_shows_perplexities_memory_and_where_things_are(wanda: PruneResult) -> None:
    from rich.console import Console

    from espalier.pipeline.cli.tables import result_table

    console = Console(width=200, record=True, file=io.StringIO())
    console.print(result_table(wanda.run))
    shown = console.export_text()
    assert f"{wanda.perplexity:,.2f}" in shown and "50.00 %" in shown
    assert "shard 0" in shown and "shard 1" in shown and "estimate" in shown and str(wanda.output) in shown


def test_sparsity_zero_says_that_it_removes_nothing_and_removes_nothing(
    request_for: Callable[..., PruneConfig], tiny_model: Callable[..., Path]
) -> None:
    listener = Listener()
    result = prune(request_for(sparsity=0), listener)
    said = "sparsity 0 removes no weight; give --sparsity above 0"
    assert result.run["warnings"] == [said] and listener.notes.count(f"warning: {said}") == 1
    dense, pruned = tensors_of(tiny_model()), tensors_of(result.output)
    assert dense.keys() == pruned.keys() and all(torch.equal(dense[name], pruned[name]) for name in dense)
