"""Comparing runs: the order, the files, and what is refused."""

import csv
import io
import math
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from rich.console import Console

from espalier.pipeline.commands.compare import compare, recipe
from espalier.pipeline.record.mlflow_client import experiment_id, open_client
from espalier.stages.errors import Refusal

RUNS: dict[str, dict[str, Any]] = {
    "magnitude": {"criterion": "magnitude", "perplexity": 300.0, "sparsity": 0.5},
    "wanda 30": {"criterion": "wanda", "perplexity": 4.1, "sparsity": 0.3},
    "wanda 50": {"criterion": "wanda", "perplexity": 18.1, "sparsity": 0.5},
    "reconstructed": {
        "criterion": "wanda",
        "reconstruct": "component",
        "epochs": 3,
        "perplexity": 6.2,
        "sparsity": 0.5,
    },
    "2:4": {"criterion": "wanda", "pattern": "2:4", "perplexity": 25.0, "sparsity": 0.5},
}


def record(client: Any, experiment: str, name: str, values: dict[str, Any], status: str = "FINISHED") -> str:
    params = {"model": "models/tiny", "reconstruct": "none", "inputs": "dense", "refine": "none", "pattern": None}
    params |= {key: values[key] for key in ("criterion", "pattern", "reconstruct", "epochs") if key in values}
    tags = {"espalier.run_id": f"id-of-{name}", "espalier.command": "prune"}
    tags |= {"espalier.compute": values["compute"]} if "compute" in values else {}
    run_id: str = client.create_run(experiment, run_name=name, tags=tags).info.run_id
    for key, value in (params | {"sparsity": values["sparsity"]}).items():
        client.log_param(run_id, key, str(value))
    if "perplexity" in values:
        totals = {"dense_perplexity": 3.63, "seconds/total": 40.0, "peak_memory_mb/shard_max": 900.0}
        for key, value in (
            totals | {key: values[key] for key in ("perplexity", "sparsity", "kl") if key in values}
        ).items():
            client.log_metric(run_id, key, value)
    if status != "RUNNING":
        client.set_terminated(run_id, status)
    return run_id


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """A database with an older experiment that holds only a running run, and `recipes`; and the ids of its runs."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('compare') / 'mlflow.db'}"
    client = open_client(uri)
    record(client, experiment_id(client, "unfinished", uri), "still going", {"sparsity": 0.5}, status="RUNNING")
    experiment = experiment_id(client, "recipes", uri)
    ids = {name: record(client, experiment, name, values) for name, values in RUNS.items()}
    ids["broken"] = record(client, experiment, "broken", {"criterion": "wanda", "sparsity": 0.5}, status="FAILED")
    return uri, ids


def test_runs_are_sorted_by_perplexity_with_those_that_have_none_last(recorded: tuple[str, dict[str, str]]) -> None:
    comparison = compare([], tracking_uri=recorded[0])  # the newest experiment
    assert [row["run"] for row in comparison.rows] == [
        "wanda 30",
        "reconstructed",
        "wanda 50",
        "2:4",
        "magnitude",
        "broken",
    ]
    assert comparison.rows[-1]["status"] == "FAILED"
    assert comparison.files == []
    best = comparison.rows[1]
    assert (best["reconstruct"], best["inputs"], best["epochs"]) == ("component", "dense", "3")
    assert (best["perplexity"], best["dense_perplexity"], best["seconds"], best["shard_peak_mb"]) == (
        6.2,
        3.63,
        40,
        900,
    )
    assert [row["target"] for row in comparison.rows[2:4]] == ["50 %", "2:4"]


def test_an_experiment_by_name_and_runs_by_either_id(recorded: tuple[str, dict[str, str]]) -> None:
    uri, ids = recorded
    assert len(compare(["recipes"], tracking_uri=uri).rows) == len(RUNS) + 1
    chosen = compare([ids["magnitude"], "id-of-reconstructed", ids["reconstructed"]], tracking_uri=uri)
    assert [row["run"] for row in chosen.rows] == ["reconstructed", "magnitude"]


def test_the_table_shows_every_run_whole_on_eighty_columns(recorded: tuple[str, dict[str, str]]) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(compare(["recipes"], tracking_uri=recorded[0]).table())
    text = console.export_text()
    assert all(name in text for name in RUNS)
    assert "dense perplexity 3.63" in text and "50.00 %" in text and "900 MB" in text and "(failed)" in text
    assert "…" not in text


def test_an_infinite_perplexity_is_last_and_reads_as_such(recorded: tuple[str, dict[str, str]]) -> None:
    uri = recorded[0]
    client = open_client(uri)
    experiment = experiment_id(client, "diverged", uri)
    for name, perplexity in (("lost", math.inf), ("kept", 7.0)):
        record(client, experiment, name, {"criterion": "wanda", "perplexity": perplexity, "sparsity": 0.9})
    rows = compare(["diverged"], tracking_uri=uri).rows
    assert [(row["run"], row["perplexity"]) for row in rows] == [("kept", 7.0), ("lost", math.inf)]


def test_kl_is_shown_where_some_run_has_it(recorded: tuple[str, dict[str, str]]) -> None:
    uri = recorded[0]
    client = open_client(uri)
    experiment = experiment_id(client, "compared", uri)
    record(client, experiment, "with", {"criterion": "wanda", "perplexity": 7.0, "sparsity": 0.5, "kl": 0.12345})
    record(client, experiment, "without", {"criterion": "wanda", "perplexity": 8.0, "sparsity": 0.5})
    console = Console(width=80, record=True, file=io.StringIO())
    comparison = compare(["compared"], tracking_uri=uri)
    console.print(comparison.table())
    assert "0.1235" in console.export_text() and "| 0.1235 |" in comparison.markdown()
    assert [row["kl"] for row in comparison.rows] == [0.12345, None]
    other = compare(["recipes"], tracking_uri=uri)
    assert "KL" not in other.table().caption and "| KL |" not in other.markdown()


def test_what_runs_were_computed_in_is_a_column_where_they_differ_and_a_word_where_not(
    recorded: tuple[str, dict[str, str]],
) -> None:
    uri = recorded[0]
    client = open_client(uri)
    experiment = experiment_id(client, "arithmetic", uri)
    values = {"criterion": "wanda", "perplexity": 7.0, "sparsity": 0.5}
    ids = [record(client, experiment, name, values | {"compute": name}) for name in ("bf16", "fp32")]
    both, alone = compare(["arithmetic"], tracking_uri=uri), compare(ids[1:], tracking_uri=uri)
    assert {row["run"]: row["compute"] for row in both.rows} == {"bf16": "bf16", "fp32": "fp32"}
    heads = [column.header for column in both.table().columns]
    assert "computed in" in heads and "computed in" not in both.table().caption
    assert "computed in" not in [column.header for column in alone.table().columns]
    assert alone.table().caption.startswith("computed in fp32; ")
    assert "| computed in |" in alone.markdown()
    unknown = compare(["recipes"], tracking_uri=uri)
    assert "computed in" not in unknown.markdown() + unknown.table().caption


def test_files_are_written_and_the_picture_is_not_blank(recorded: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    comparison = compare(["recipes"], tracking_uri=recorded[0], out=out)
    assert sorted(path.name for path in comparison.files) == ["compare.csv", "compare.md", "perplexity.png"]
    assert sorted(comparison.files) == sorted(out.iterdir())
    with (out / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["perplexity"]) for row in rows[:-1]] == [4.1, 6.2, 18.1, 25.0, 300.0]
    assert rows[0]["run_id"] == recorded[1]["wanda 30"]
    text = (out / "compare.md").read_text()
    assert "perplexity.png" in text and all(name in text for name in RUNS)
    pixels = imread(out / "perplexity.png")[..., :3]
    assert 0.005 < (pixels.min(axis=2) < 0.9).mean() < 0.9


def test_a_recipe_is_named_by_what_was_done_and_not_by_how_much(recorded: tuple[str, dict[str, str]]) -> None:
    names = {row["run"]: recipe(row) for row in compare(["recipes"], tracking_uri=recorded[0]).rows}
    assert names["wanda 30"] == names["wanda 50"] == "wanda"
    assert names["2:4"] == "wanda 2:4"
    assert names["reconstructed"] == "wanda + component reconstruction (dense inputs, 3 epochs)"


@pytest.mark.parametrize("name", ["recipies", "recipe"])
def test_an_unknown_experiment_is_refused_with_the_nearest_name(
    recorded: tuple[str, dict[str, str]], name: str
) -> None:
    with pytest.raises(Refusal, match=f"no experiment or run '{name}'.*did you mean 'recipes'"):
        compare([name], tracking_uri=recorded[0])


def test_an_unknown_run_is_refused_with_the_nearest_id(recorded: tuple[str, dict[str, str]]) -> None:
    uri, ids = recorded
    wrong = ids["reconstructed"][:-1] + ("0" if ids["reconstructed"][-1] != "0" else "1")
    with pytest.raises(Refusal, match=f"{wrong}.*{ids['reconstructed']}"):
        compare([ids["magnitude"], wrong], tracking_uri=uri)
    with pytest.raises(Refusal, match=r"the experiments are .*'recipes'"):
        compare(["qqqq'; drop"], tracking_uri=uri)


def test_an_experiment_without_a_finished_run_is_refused(recorded: tuple[str, dict[str, str]]) -> None:
    with pytest.raises(Refusal, match=r"unfinished.*no finished run.*still going is running"):
        compare(["unfinished"], tracking_uri=recorded[0])


def test_a_folder_without_a_database_is_refused_and_none_is_made(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="no runs are recorded"):
        compare([], tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_down_or_silent_is_refused_within_ten_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(Refusal, match="cannot be read \\(no answer in time\\)"):
            compare([], tracking_uri=uri)
        assert time.monotonic() - began < 10
    began = time.monotonic()
    with pytest.raises(Refusal, match="cannot be read \\(connection refused\\)"):
        compare([], tracking_uri=uri)
    assert time.monotonic() - began < 10
