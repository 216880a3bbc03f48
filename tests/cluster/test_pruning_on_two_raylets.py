"""`espalier prune` on a cluster of two raylets: the same bytes as one plain shard, however the command got there."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from ray.util.placement_group import placement_group, remove_placement_group
from whole_runs import Command, Listener, prune_line, users_modules, weights_of

from espalier.cluster.connection.connect import connect
from espalier.pipeline.cli.main import main
from espalier.pipeline.config.prune import PruneConfig
from espalier.pipeline.pruning.prune import prune

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def test_the_bytes_are_the_same_with_shards_on_two_nodes_and_one_node_lost(
    member: Any, wanted: dict[str, Any], expected: dict[str, str], database: str, tmp_path: Path
) -> None:
    # One CPU of each node is another's, so each has a shard. The second raylet goes while its shard is at work, and a
    # third comes: it gets the shard, though the group's other place stays where it is.
    lost: list[int] = []

    def lose_a_node(block: int) -> None:
        if not lost:
            lost.append(block)
            member.kill_node(1)
            member.add_node()

    request = PruneConfig(**wanted, output=str(tmp_path / "out"), shards=2)
    with connect(member.address, cpus=2, gpus=0, object_store_bytes=1 << 27):
        others = placement_group([{"CPU": 1.0}] * 2, strategy="STRICT_SPREAD")
        assert others.wait(60)
        listener = Listener(on_block=lose_a_node)
        result = prune(request, listener)
        remove_placement_group(others)
    assert weights_of(result.output) == expected
    assert result.run["shards"][0]["device"] == "cpu" and len(result.run["shards"]) == 2
    assert any("a shard was lost" in warning for warning in result.run["warnings"])


def test_a_submitted_run_gives_the_same_bytes_and_a_complete_record(
    member: Any,
    wanted: dict[str, Any],
    expected: dict[str, str],
    database: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = prune_line(wanted, output="out", shards=2, experiment="submitted")
    assert main(["submit", "--address", member.dashboard_url, "--", *command]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^block \d .* \d/4 blocks", out, re.MULTILINE) and str(tmp_path / "out") in out
    assert weights_of(tmp_path / "out") == expected
    run = json.loads((tmp_path / "out" / "espalier" / "run.json").read_text())
    assert run["tracking_uri"] == database and run["warnings"] == []

    from mlflow import MlflowClient

    record = MlflowClient(tracking_uri=database).get_run(run["mlflow_run_id"])
    assert record.info.status == "FINISHED" and record.data.metrics["perplexity"] == run["perplexity"]


def test_a_refusal_inside_the_job_comes_back_as_its_one_line_and_exit_code_2(
    member: Any, wanted: dict[str, Any], database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = prune_line(wanted | {"samples": 1000}, output="out")
    assert main(["submit", "--address", member.dashboard_url, "--", *command]) == 2
    captured = capsys.readouterr()
    said = [line for line in (captured.out + captured.err).splitlines() if line.startswith("espalier: ")]
    assert len(said) == 1 and "--samples 125" in said[0]
    assert "Traceback" not in captured.out + captured.err and not (tmp_path / "out").exists()


OWN = """
def slow_wanda(weight, statistics):
    return weight.float().abs() * statistics.norm.to(weight.device)
"""


@pytest.mark.parametrize("way", ["--address", "submit"])
def test_a_criterion_of_one_s_own_goes_along_to_the_cluster(
    way: str, member: Any, wanted: dict[str, Any], database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_scores.py").write_text(OWN)
    more = {"criterion": "own_scores.slow_wanda", "refine": "none", "reconstruct": "none", "shards": 2}
    command = prune_line({name: value for name, value in wanted.items() if name != "eval"}, output="out", **more)
    if way == "submit":
        command = ["submit", "--address", member.dashboard_url, "--", *command]
    else:
        command += ["--address", member.address]
    assert main(command) == 0, capsys.readouterr()
    assert json.loads((tmp_path / "out" / "espalier" / "run.json").read_text())["sparsity"] == 0.5


def test_a_submitted_run_heeds_no_module_of_the_users_that_has_a_name_of_ours(
    member: Any, wanted: dict[str, Any], database: str, tmp_path: Path
) -> None:
    users = users_modules(tmp_path / "users")
    more = {"criterion": "cluster.mine", "refine": "none", "reconstruct": "none", "shards": 2}
    command = prune_line({k: v for k, v in wanted.items() if k != "eval"}, output=tmp_path / "out", **more)
    path = os.pathsep.join([str(users), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = Command(["submit", "--address", member.dashboard_url, "--", *command], {"PYTHONPATH": path}, users)
    assert run.finish()[0] == 0, run.lines
    assert json.loads((tmp_path / "out" / "espalier" / "run.json").read_text())["sparsity"] == 0.5
