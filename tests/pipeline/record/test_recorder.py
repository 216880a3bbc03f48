"""The record of a run: everything arrives in MLflow, and a tracker in trouble costs the run nothing."""

import contextlib
import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from espalier.pipeline.record.metric_names import block_metrics, total_metrics
from espalier.pipeline.record.mlflow_client import open_client, reason
from espalier.pipeline.record.recorder import Recorder, default_tracking_uri, recorded_run, ui_command


@pytest.fixture(scope="module")
def made_by_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[tuple[int, str, str]]]:
    """A database that two processes made at once, and how each fared. The space in its path is there on purpose."""
    program = (
        "import sys; from espalier.pipeline.record.mlflow_client import open_client, experiment_id; "
        "c = open_client(sys.argv[1]); c.create_run(experiment_id(c, 'by two', sys.argv[1]))"
    )
    uri = f"sqlite:///{tmp_path_factory.mktemp('track ing') / 'mlflow.db'}"
    command = [sys.executable, "-c", program, uri]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=120) for process in both]
    return uri, [(process.returncode, *output) for process, output in zip(both, told, strict=True)]


@pytest.fixture
def database(made_by_two: tuple[str, list[tuple[int, str, str]]]) -> str:
    """One database for all tests here: MLflow takes seconds to make one."""
    return made_by_two[0]


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    held: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    held.append(server.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        for connection in held:
            connection.close()


@pytest.fixture
def dead_server() -> str:
    """An address at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def recorder(directory: Path, uri: str, **changes: Any) -> Recorder:
    settings: dict[str, Any] = {
        "experiment": "tests",
        "run_name": "a run",
        "params": {"criterion": "wanda", "sparsity": 0.5},
        "tags": {"espalier.run_id": "r1"},
    }
    return Recorder(directory=directory, tracking_uri=uri, **(settings | changes))


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def history(uri: str, run_id: str | None, key: str) -> list[tuple[int, float]]:
    assert run_id is not None
    return [(metric.step, metric.value) for metric in open_client(uri).get_metric_history(run_id, key)]


def test_params_tags_stepped_metrics_and_artifacts_come_back_through_mlflow(tmp_path: Path, database: str) -> None:
    (tmp_path / "report.md").write_text("# a report")
    record = recorder(tmp_path / "out", database, params={"criterion": "wanda", "long": "x" * 9000, "odd(key)": None})
    for step in range(1200):  # more than MLflow takes in one batch
        record.metrics({"mlp/error_after": 1 / (step + 1)}, step=step)
    record.metrics({"perplexity": 6.2})
    record.artifact(tmp_path / "report.md")
    before = time.time()
    record.close()
    assert record.warning is None

    client = open_client(database)
    run = client.get_run(record.run_id)
    assert run.data.params["criterion"] == "wanda"
    assert len(run.data.params["long"]) == 6000
    assert run.data.params["odd_key_"] == "None"
    assert run.data.tags["espalier.run_id"] == "r1"
    assert run.info.run_name == "a run"
    assert run.info.status == "FINISHED"
    assert abs(run.info.end_time / 1000 - before) < 1  # the end of the run, not of the sending
    assert run.data.metrics["perplexity"] == 6.2
    expected = [(step, 1 / (step + 1)) for step in range(1200)]
    assert sorted(history(database, record.run_id, "mlp/error_after")) == expected
    assert [file.path for file in client.list_artifacts(record.run_id)] == ["report.md"]
    copied = client.download_artifacts(record.run_id, "report.md", str(tmp_path))
    assert Path(copied).read_text() == "# a report"
    assert recorded_run(tmp_path / "out") == record.run_id


def test_artifacts_of_a_sqlite_database_lie_beside_it(tmp_path: Path, database: str) -> None:
    (tmp_path / "a.txt").write_text("a")
    record = recorder(tmp_path, database)
    record.artifact(tmp_path / "a.txt")
    record.close()
    folder = Path(database.removeprefix("sqlite:///")).parent / "mlartifacts"
    assert (folder / str(record.run_id) / "artifacts" / "a.txt").read_text() == "a"


def test_a_resumed_run_goes_on_in_the_same_mlflow_run_with_what_was_not_sent(tmp_path: Path, database: str) -> None:
    first = recorder(tmp_path, database, params={"shards": 2, "seed": 0})
    first.metrics({"block/seconds": 1.0}, step=0)
    first.close("KILLED")
    # Written by a driver that was killed before it could send, and while it wrote its last line.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"time": 1e9, "step": 1, "metrics": {"block/seconds": 2.0}}) + "\n")
        file.write('{"time": 1e9, "step": 2, "met')

    second = recorder(tmp_path, database, params={"shards": 3, "seed": 0}, run_id=recorded_run(tmp_path))
    second.metrics({"block/seconds": 3.0}, step=2)
    second.close()
    assert second.warning is None
    assert second.run_id == first.run_id
    assert sorted(history(database, first.run_id, "block/seconds")) == [(0, 1.0), (1, 2.0), (2, 3.0)]
    run = open_client(database).get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["shards"] == "2"
    assert run.data.tags["espalier.resumed.shards"] == "3"
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["metrics"] == {"block/seconds": 3.0}


def test_resuming_a_run_that_the_server_does_not_have_makes_a_new_one(tmp_path: Path, database: str) -> None:
    record = recorder(tmp_path, database, run_id="0" * 32)
    record.close()
    assert record.warning is None
    assert record.run_id not in (None, "0" * 32)


def test_a_server_that_is_down_costs_one_warning_and_leaves_every_number(tmp_path: Path, dead_server: str) -> None:
    record = recorder(tmp_path, dead_server)
    for step in range(500):
        record.metrics({"mlp/error_after": step / 7}, step=step)
    assert record.wait_for_run_id(30) is None
    record.close(timeout_seconds=1)
    assert record.run_id is None
    warning = record.warning
    assert warning is not None and "\n" not in warning
    assert dead_server in warning and "connection refused" in warning and str(tmp_path / "metrics.jsonl") in warning
    written = lines(tmp_path)
    assert [line["step"] for line in written] == list(range(500))
    assert [line["metrics"]["mlp/error_after"] for line in written] == [step / 7 for step in range(500)]
    assert all(abs(line["time"] - time.time()) < 60 for line in written)


def test_a_server_that_never_answers_holds_close_no_longer_than_its_timeout(tmp_path: Path, silent_server: str) -> None:
    before = set(threading.enumerate())
    record = recorder(tmp_path, silent_server)
    (sending,) = set(threading.enumerate()) - before
    for step in range(500):
        record.metrics({"x": float(step)}, step=step)
    record.close(timeout_seconds=1.5)
    assert sending.is_alive(), "it still waits for the answer that nobody else waited for"
    assert record.warning is not None and silent_server in record.warning
    assert len(lines(tmp_path)) == 500


def test_what_a_server_missed_while_it_was_away_arrives_in_order_when_it_is_back(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = threading.Event()
    away.set()
    tried = threading.Event()
    sent: list[int] = []
    log = MlflowClient.log_batch

    def unreliable(self: MlflowClient, run_id: str, metrics: Any = (), **others: Any) -> None:
        if metrics:
            tried.set()
        if metrics and away.is_set():
            raise ConnectionError("the server is away")
        sent.extend(metric.step for metric in metrics)
        log(self, run_id, metrics, **others)

    monkeypatch.setattr(MlflowClient, "log_batch", unreliable)
    record = recorder(tmp_path, database)
    for step in range(10):
        record.metrics({"x": 1.0}, step=step)
    assert tried.wait(30)
    for step in range(10, 20):
        record.metrics({"x": 1.0}, step=step)
    away.clear()
    record.close()
    assert record.warning is None
    assert sent == list(range(20))
    assert len(history(database, record.run_id, "x")) == 20


def test_a_run_that_is_interrupted_while_its_end_is_on_its_way_was_killed(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, goes_on, log = threading.Event(), threading.Event(), MlflowClient.log_batch

    def slow(self: MlflowClient, run_id: str, metrics: Any = (), **others: Any) -> None:
        if metrics:
            reached.set()
            assert goes_on.wait(60)
        log(self, run_id, metrics, **others)

    monkeypatch.setattr(MlflowClient, "log_batch", slow)
    record = recorder(tmp_path, database)
    record.metrics({"sparsity": 0.5})
    assert reached.wait(60)
    record.close(timeout_seconds=0)  # where Ctrl-C finds it
    goes_on.set()
    record.abandon(KeyboardInterrupt())
    assert record.run_id is not None
    assert open_client(database).get_run(record.run_id).info.status == "KILLED"
    assert history(database, record.run_id, "sparsity") == [(0, 0.5)]


def test_a_missing_artifact_is_told_and_stops_nothing(tmp_path: Path, database: str) -> None:
    record = recorder(tmp_path, database)
    record.artifact(tmp_path / "not-there.png")
    record.metrics({"perplexity": 6.2})
    record.close()
    assert record.warning is not None and "not-there.png" in record.warning
    assert history(database, record.run_id, "perplexity") == [(0, 6.2)]


def test_numbers_that_json_lacks_are_kept(tmp_path: Path, dead_server: str) -> None:
    record = recorder(tmp_path, dead_server)
    record.metrics({"perplexity": float("inf"), "x": float("nan")})
    record.close(timeout_seconds=0)
    assert lines(tmp_path)[0]["metrics"] == {"perplexity": "inf", "x": "nan"}


def test_two_processes_can_make_one_database_at_once_and_quietly(
    made_by_two: tuple[str, list[tuple[int, str, str]]],
) -> None:
    uri, outcomes = made_by_two
    assert outcomes == [(0, "", ""), (0, "", "")]
    left = [path.name for path in Path(uri.removeprefix("sqlite:///")).parent.iterdir()]
    assert [name for name in left if name.startswith("mlflow.db")] == ["mlflow.db"]
    client = open_client(uri)
    assert len(client.search_runs([client.get_experiment_by_name("by two").experiment_id])) == 2


def test_the_default_is_a_database_here_unless_the_environment_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert default_tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    assert ui_command(default_tracking_uri()) == "mlflow ui --backend-store-uri sqlite:///mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert default_tracking_uri() == "http://tracker:5000"
    assert ui_command(default_tracking_uri()).endswith(" http://tracker:5000")
    assert "/elsewhere/mlflow.db" in ui_command("sqlite:////elsewhere/mlflow.db")


def test_metric_names_are_those_that_compare_reads() -> None:
    unit = {"name": "self_attn", "error_before": 0.12, "error_after": 0.03}
    block = {"block": 3, "sparsity": 0.5, "seconds": {"mask": 0.5, "commit": 0.25}, "tokens_per_second": 10.0}
    block |= {"gflops": 300.0, "peak_memory": 2_000_000, "units": [unit, {"name": "mlp", "error_before": None}]}
    assert block_metrics(block) == {
        "self_attn/error_before": 0.12,
        "self_attn/error_after": 0.03,
        "block/sparsity": 0.5,
        "block/seconds": 0.75,
        "block/tokens_per_second": 10.0,
        "block/gflops": 300.0,
        "block/peak_memory_mb": 2.0,
    }
    run = {"sparsity": 0.5, "perplexity": 6.2, "dense_perplexity": None, "seconds": {"total": 9.0, "stream": 2.0}}
    run |= {"peak_memory": {"driver": 1_000_000, "shards": [3_000_000, 4_000_000]}}
    assert total_metrics(run) == {
        "sparsity": 0.5,
        "perplexity": 6.2,
        "seconds/total": 9.0,
        "seconds/stream": 2.0,
        "peak_memory_mb/driver": 1.0,
        "peak_memory_mb/shard_max": 4.0,
    }


def test_mlflow_is_not_imported_before_it_is_needed() -> None:
    room = "espalier.pipeline"
    program = f"import sys, {room}.record.recorder, {room}.commands.compare; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_opening_a_client_keeps_migrations_quiet(database: str) -> None:
    open_client(database)
    assert logging.getLogger("alembic.runtime.migration").getEffectiveLevel() >= logging.ERROR


def test_credentials_of_the_uri_are_used_and_in_no_warning_and_no_file(
    tmp_path: Path, dead_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = dead_server.replace("://", "://ann:planted-password@")
    opened: list[str] = []

    def opening(uri: str) -> MlflowClient:
        opened.append(uri)
        return open_client(uri)

    monkeypatch.setattr("espalier.pipeline.record.recorder.open_client", opening)
    record = recorder(tmp_path, uri)
    assert record.tracking_uri == dead_server
    record.close(timeout_seconds=1)
    assert set(opened) == {uri}
    assert record.warning is not None and dead_server in record.warning and "planted" not in record.warning
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"planted" in path.read_bytes()]


def test_credentials_in_a_parameter_do_not_reach_the_server(tmp_path: Path, database: str) -> None:
    record = recorder(tmp_path, database, params={"source": "https://ann:planted-password@host/x"})
    record.close()
    assert record.run_id is not None
    source = open_client(database).get_run(record.run_id).data.params["source"]
    assert source.startswith("https://") and source.endswith("host/x") and "planted" not in source


def test_a_fault_that_quotes_the_uri_is_told_without_its_credentials() -> None:
    fault = RuntimeError("cannot open postgresql://ann:planted@" + "db." * 60)
    assert reason(fault).startswith("cannot open postgresql://db.db.") and "planted" not in reason(fault)


def test_the_command_to_look_at_a_database_with_a_password_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://ann:planted@db/mlflow")
    assert ui_command("postgresql://db/mlflow") == 'mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"'
    assert ui_command("postgresql://other/mlflow") == "mlflow ui --backend-store-uri postgresql://other/mlflow"


def test_a_resumed_run_that_is_recorded_elsewhere_says_so(tmp_path: Path, dead_server: str) -> None:
    (tmp_path / "mlflow.json").write_text(json.dumps({"run_id": "1" * 32, "tracking_uri": "postgresql://db/mlflow"}))
    record = recorder(tmp_path, dead_server, run_id=recorded_run(tmp_path))
    record.close(timeout_seconds=1)
    assert record.warning is not None
    assert f"began in MLflow at postgresql://db/mlflow and went on at {dead_server}" in record.warning


def test_a_folder_of_any_name_keeps_its_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    name = "what? 100%20 #1"
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.chdir(folder)
    record = recorder(folder / "out", default_tracking_uri())
    record.metrics({"x": 1.0})
    record.tag("espalier.compute", "fp32")
    record.artifact(Path(__file__))
    record.close()
    assert record.warning is None
    assert history(default_tracking_uri(), record.run_id, "x") == [(0, 1.0)]
    tags = open_client(default_tracking_uri()).get_run(record.run_id or "").data.tags
    assert tags["espalier.compute"] == "fp32"
    assert sorted(path.name for path in folder.iterdir()) == ["mlartifacts", "mlflow.db", "out"]
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert ui_command(record.tracking_uri) == "mlflow ui --backend-store-uri sqlite:///mlflow.db"
