"""Tracking experiments: recipes, what they refuse, the data they prepare, the curve, and one very small whole run."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from whole_runs import Listener, recorded_outside_the_table, write_text

from espalier.pipeline.config.track import TrackConfig, load_config, recipes
from espalier.stages.errors import Refusal

SMALL = {
    "model": {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 16},
    "length": 16,
    "steps": 10,
    "batch": 4,
    "warmup": 2,
    "shadow_every": 2,
    "sparsities": [0, 0.5],
    "finetune_steps": 3,
}


@pytest.fixture
def small(text: Path, tmp_path: Path) -> dict[str, Any]:
    """The values of a very small experiment."""
    return SMALL | {"data": str(text), "output": str(tmp_path / "out")}


def refusal(tmp_path: Path, values: dict[str, Any]) -> str:
    """What is said of a recipe with these values."""
    import yaml

    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(Refusal) as caught:
        load_config(str(file), {})
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- recipes -------------------------------------------------------------------------------------------------------


def test_the_shipped_recipes_are_whole_and_as_large_as_they_say() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    sizes = {"shakespeare": 10.7e6, "shakespeare-small": 0.8e6}
    assert set(recipes()) >= set(sizes)
    for name, size in sizes.items():
        config = load_config(name, {"data": "text.txt", "output": "out"})
        assert isinstance(config.model, dict)
        import torch

        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**(config.model | {"vocab_size": 66})))
        assert model.num_parameters() == pytest.approx(size, rel=0.03)
    paper = load_config("shakespeare", {"data": "text.txt", "output": "out"})
    assert (paper.steps, paper.batch, paper.length, paper.finetune_epochs) == (5000, 64, 256, 50)
    assert paper.sparsities == [0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.94]
    assert dict(paper.published["published, 10.7 M"])[0.94] == 3.098


def test_flags_override_a_recipe_and_its_other_way_to_say_the_same(tmp_path: Path) -> None:
    flags = {"data": "t", "output": "o", "rates": "0,0.5,2", "finetune_epochs": "2", "score": "final", "steps": "40"}
    config = load_config("shakespeare-small", flags)
    assert (config.rates, config.sparsities) == ([0, 0.5, 2], None)
    assert (config.finetune_epochs, config.finetune_steps, config.steps) == (2, None, 40)
    assert config.window == 1 and config.name == "final weights"
    other = load_config("shakespeare-small", {"data": "t", "output": "o", "shadow_window": "5", "shadow_dtype": "int8"})
    assert other.window == 5 and other.name == "linear, window 5, int8"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rates": [1, 1, 2], "sparsities": None}, "rates 1,1,2: must be increasing"),
        ({"rates": [-1, 2], "sparsities": None}, "rates -1,2: must be at least 0"),
        ({"sparsities": [0.5, 1]}, "sparsities 0.5,1: must be below 1"),
        ({"sparsities": "many"}, "sparsities many: give numbers"),
        ({"rates": [1, 2]}, r"rates .* and sparsities .*: give one"),
        ({"sparsities": None}, "rates, sparsities: neither is given"),
        ({"finetune_epochs": 2}, "give one of the two"),
        ({"shadow_every": 11}, "shadow-every 11: no snapshot in 10 steps"),
        ({"score": "final", "shadow_every": 3}, "the last of 10 steps is no snapshot"),
        ({"score": "final", "shadow_window": 3}, "only the last weights count"),
        ({"data_kind": "character"}, "did you mean characters"),
        ({"stepps": 3}, "did you mean steps"),
        ({"steps": 0}, "option steps = 0"),
        ({"data": None}, "data"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(tmp_path: Path, small: dict[str, Any], changes: dict, said: str) -> None:
    values = {name: value for name, value in (small | changes).items() if value is not None}
    import re

    assert re.search(said, refusal(tmp_path, values))


def test_an_unknown_recipe_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="did you mean shakespeare"):
        load_config("shakespear", {})
    with pytest.raises(Refusal, match="no such file"):
        load_config(str(tmp_path / "mine.yaml"), {})


# -- what is prepared ----------------------------------------------------------------------------------------------


def test_characters_are_prepared_as_tables_and_a_model_of_that_vocabulary(
    small: dict[str, Any], tmp_path: Path
) -> None:
    from espalier.pipeline.weight_tracking.data import prepare
    from espalier.stages.data.training_batches import open_source

    config = TrackConfig(**small)
    material = prepare(config, tmp_path)
    content = Path(config.data).read_text()
    settings = json.loads((Path(material.model) / "config.json").read_text())
    assert settings["vocab_size"] == len(set(content)) + 1 and settings["eos_token_id"] is None
    training, evaluation = (open_source(source) for source in (material.sources.data, material.sources.eval) if source)
    learned = int(0.9 * len(content))
    assert material.epoch == learned // 16 and len(training) == material.epoch * 16 - 15
    assert len(evaluation) == (len(content) - learned) // 16
    assert len(material.calibration) == 1 and len(material.calibration[0]) == 16
    assert material.evaluation is not None and Path(material.evaluation).read_text() == content[learned:]


def test_a_model_that_transformers_does_not_have_is_refused(small: dict[str, Any], tmp_path: Path) -> None:
    from espalier.pipeline.weight_tracking.data import prepare

    with pytest.raises(Refusal, match="model_type 'gpt9'"):
        prepare(TrackConfig(**(small | {"model": {"model_type": "gpt9"}})), tmp_path)
    with pytest.raises(Refusal, match="no tokenizer"):
        prepare(TrackConfig(**(small | {"data_kind": "text"})), tmp_path)


# -- the curve -----------------------------------------------------------------------------------------------------


def finished_run(config: TrackConfig) -> dict[str, Any]:
    """A run.json of a finished experiment, made up."""
    points = [
        {"target": s, "rate": 2 * s, "sparsity": s, "pruned": 1.5 + 4 * s, "tuned": 1.5 + (s - 0.3) ** 2, "steps": 9}
        | {"seconds": 12.5, "checkpoint": f"point-{s}", "mlflow_run_ids": []}
        for s in (0.0, 0.3, 0.6, 0.9)
    ]
    return {
        "config": config.model_dump(mode="json"),
        "model": {"family": "gpt2", "parameters": 810_000, "blocks": 4},
        "trained": 1.55,
        "points": points,
        "cost": {
            "dense training": {"seconds": 100.0, "flops": 3e12, "energy": {"cpu": 4200.0, "gpu": None}},
            "tracking": {"seconds": 2.0, "flops": 1e9, "energy": None},
            "fine-tuning": {"seconds": 120.0, "flops": 2e12, "energy": None},
        },
        "metric": "loss",
        "unit": "nats a token",
        "beside": config.published,
        "seconds": 320.0,
        "picture": "curve.png",
        "report": "report.md",
        "tracking_uri": "sqlite:///mlflow.db",
    }


def test_the_report_shows_each_point_and_what_was_published_beside_it(small: dict[str, Any], tmp_path: Path) -> None:
    from espalier.pipeline.reports.track import cells, write_report

    config = TrackConfig(**(small | {"published": {"paper": [(0, 1.9), (0.59, 1.656)]}}))
    run = finished_run(config)
    report, picture = write_report(run, tmp_path)
    header, rows = cells(run)
    column = header.index("paper")
    assert [row[column] for row in rows] == ["1.900", "–", "1.656", "–"]
    said = report.read_text()
    assert all(row[0] in said for row in rows) and "30.00 % zeros" in said and "curve.png" in said
    assert "| dense training | 1.7 min | CPU 4.2 kJ | 3 TFLOP |" in said
    assert "| tracking | 2.0 s | with dense training | 1 GFLOP |" in said and "| 2.0 min | not measured |" in said
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
    again = tmp_path / "again.yaml"
    again.write_text(said.partition("```yaml\n")[2].partition("```")[0])
    assert load_config(str(again), {"output": config.output}) == config


def test_costs_add_up_and_joules_only_where_all_were_measured() -> None:
    from espalier.pipeline.weight_tracking.cost import cost_of, cost_of_tracking, summed

    run = {
        "seconds": {"steps": 8.0, "track": 1.0, "total": 10.0},
        "flops": {"steps": 100.0, "track": 3.0},
        "energy": {"total": {"cpu": 5.0, "gpu": None}},
    }
    dense = cost_of(run, without="track")
    assert dense == {"seconds": 9.0, "flops": 100.0, "energy": {"cpu": 5.0, "gpu": None}}
    assert cost_of_tracking(run) == {"seconds": 1.0, "flops": 3.0, "energy": None}
    assert summed([dense, dense]) == {"seconds": 18.0, "flops": 200.0, "energy": {"cpu": 10.0, "gpu": None}}
    assert summed([dense, cost_of(run | {"energy": {}})])["energy"] is None


# -- a whole experiment --------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.slow
def test_an_interrupted_experiment_goes_on_from_what_is_finished(
    small: dict[str, Any], tmp_path: Path, recorded: str, two_ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained, tracked, pruned at two thresholds and fine-tuned; interrupted as the second begins."""
    import mlflow

    from espalier.pipeline.commands.compare import compare
    from espalier.pipeline.pruning import prune as pruning
    from espalier.pipeline.weight_tracking.track import track

    config, client = TrackConfig(**small, bos="none"), mlflow.MlflowClient(recorded)
    notes = Listener()

    def interrupted(*_: Any) -> None:  # the first point keeps every weight, and is not pruned
        raise KeyboardInterrupt

    def mlflow_runs() -> list[Any]:
        experiment = client.get_experiment_by_name(config.experiment)
        assert experiment is not None
        return list(client.search_runs([experiment.experiment_id]))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pruning, "prune", interrupted)
        track(config, notes, two_ranks)
    ended = dict.fromkeys(("training", "sparsity 0 %", "sparsity 0 %: fine-tuning"), "FINISHED")
    statuses = {run.info.run_name: run.info.status for run in mlflow_runs()}
    assert statuses == ended | dict.fromkeys(("track linear", "sparsity 50 %"), "KILLED")
    out = Path(config.output)
    before = (out / "trained" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(Refusal, match=r"finetune-steps 4: the experiment in .* was begun with 3"):
        track(config.model_copy(update={"finetune_steps": 4}), ranks=two_ranks)
    result = track(config, notes, two_ranks)
    points = [note for note in notes.notes if note.startswith("sparsity ")]
    assert [point.partition(":")[0] for point in points] == ["sparsity 0 %", "sparsity 50 %"]
    assert (out / "trained" / "model.safetensors").stat().st_mtime_ns == before

    dense, half = result.points
    assert dense["sparsity"] == 0 and half["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert dense["pruned"] == result.trained < math.log(66) and half["rate"] > 0
    assert zeros_of(out / "sparsity-50" / "tuned") == pytest.approx(half["sparsity"], abs=1e-6)
    cost = json.loads((out / "espalier" / "run.json").read_text())["cost"]
    assert list(cost) == ["dense training", "tracking", "fine-tuning", "pruning"]
    assert all(spent["flops"] > 0 and spent["seconds"] > 0 for kind, spent in cost.items() if kind != "pruning")
    for part in ("trained", "sparsity-50/pruned", "sparsity-50/tuned"):
        assert json.loads((out / part / "espalier" / "run.json").read_text())["config"]["bos"] == "none"
    assert (out / "curve.png").exists() and "50" in (out / "report.md").read_text()

    runs = mlflow_runs()
    assert {run.info.status for run in runs} == {"FINISHED"}
    tree = {run.info.run_id: (run.info.run_name, run.data.tags.get("mlflow.parentRunId")) for run in runs}
    nested = {name: tree[parent][0] if parent else None for name, parent in tree.values()}
    assert nested == {
        "track linear": None,
        **dict.fromkeys(("training", "sparsity 0 %", "sparsity 50 %"), "track linear"),
        "sparsity 0 %: fine-tuning": "sparsity 0 %",
        **dict.fromkeys(("sparsity 50 %: pruning", "sparsity 50 %: fine-tuning"), "sparsity 50 %"),
    }
    parent = next(run for run in runs if run.info.run_name == "track linear")
    (row,) = (row for row in compare([config.experiment]).rows if row["run"] == "sparsity 50 %")
    assert (row["sparsity"], row["perplexity"]) == pytest.approx((half["sparsity"], math.exp(half["tuned"])))
    assert all(recorded_outside_the_table(home) == set() for home in (out / "espalier", out / "sparsity-50"))
    curve = client.get_metric_history(parent.info.run_id, "curve/tuned")
    assert [point.value for point in curve] == pytest.approx([dense["tuned"], half["tuned"]])
    with pytest.raises(Refusal, match="finished run"):
        track(config, ranks=two_ranks)


def zeros_of(checkpoint: Path) -> float:
    """Share of zeros among the prunable weights of a checkpoint."""
    from espalier.pipeline.run.export import sparsity_of

    return sparsity_of(checkpoint)


def test_data_that_is_not_there_is_refused_before_anything_is_made(small: dict[str, Any], tmp_path: Path) -> None:
    from espalier.pipeline.weight_tracking.track import track

    with pytest.raises(Refusal, match=r"data .*poem.txt: no such file"):
        track(TrackConfig(**(small | {"data": str(tmp_path / "poem.txt")})))
    assert not Path(small["output"]).exists()


def test_a_finished_or_foreign_directory_is_refused(small: dict[str, Any], tmp_path: Path) -> None:
    from espalier.pipeline.weight_tracking.track import track

    out = tmp_path / "out"
    out.mkdir()
    write_text(out / "thesis.tex", 100, seed=0)
    with pytest.raises(Refusal, match="not empty"):
        track(TrackConfig(**small))


@pytest.mark.ray
@pytest.mark.slow
def test_on_a_cluster_with_only_as_many_cpus_as_ranks_the_pruning_gets_what_they_let_go(
    small: dict[str, Any], recorded: str
) -> None:
    from espalier.cluster.connection.connect import local_cluster
    from espalier.pipeline.weight_tracking.track import track

    config = TrackConfig(**small | {"sparsities": [0.5], "ranks": 1, "steps": 4, "warmup": 0})
    with local_cluster(cpus=1, object_store_bytes=100_000_000):
        (half,) = track(config).points
    assert half["sparsity"] == pytest.approx(0.5, abs=0.01)
