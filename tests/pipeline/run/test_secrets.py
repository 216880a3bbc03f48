"""A whole run with secrets planted wherever people keep them: nothing that it leaves, says or sends shows one."""

import base64
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from whole_runs import LENGTH, MICROBATCH, SAMPLES, Command

pytestmark = [pytest.mark.ray, pytest.mark.slow]
PLANTED = "pl4nted"
USER, PASSWORD = f"{PLANTED}-user", f"{PLANTED}-password"
SECRETS = {
    "HF_TOKEN": f"hf_{PLANTED}_token",
    "AWS_ACCESS_KEY_ID": f"AKIA{PLANTED}",
    "AWS_SECRET_ACCESS_KEY": f"{PLANTED}/secret+key",
    "MLFLOW_S3_ENDPOINT_URL": f"https://{USER}:{PASSWORD}@store",
    "RAY_AUTH_TOKEN": f"{PLANTED}-ray-token-of-another-cluster",
    "WANDB_API_KEY": f"{PLANTED}-key",
}


class Tracker(ThreadingHTTPServer):
    """As much of an MLflow server as a run needs, which keeps what it is sent. It refuses one batch of metrics."""

    def __init__(self, artifacts: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.artifacts = artifacts
        self.users: set[str] = set()
        self.sent: list[str] = []  # path and body of each request
        self.refused = False


class Answers(BaseHTTPRequestHandler):
    server: Tracker

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        self.server.users.add(base64.b64decode(self.headers["Authorization"].removeprefix("Basic ")).decode())
        self.server.sent.append(f"{self.path} {body}")
        code, content = self.what(self.path.partition("?")[0], body)
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PATCH = answer

    def what(self, path: str, body: str) -> tuple[int, dict[str, Any]]:
        run = {"run_id": "r1", "run_uuid": "r1", "experiment_id": "1", "status": "RUNNING", "lifecycle_stage": "active"}
        run["artifact_uri"] = str(self.server.artifacts)
        if path.endswith("get-by-name"):
            place = {"artifact_location": str(self.server.artifacts), "lifecycle_stage": "active"}
            return 200, {"experiment": {"experiment_id": "1", "name": "espalier", **place}}
        if path.endswith(("runs/create", "runs/get")):
            return 200, {"run": {"info": run, "data": {}}}
        if path.endswith("runs/update"):
            return 200, {"run_info": run}
        if path.endswith("log-batch") and '"metrics"' in body and not self.server.refused:
            self.server.refused = True
            uri = f"mysql://{USER}:{PASSWORD}@database/mlflow"
            return 400, {"error_code": "INVALID_PARAMETER_VALUE", "message": f"no room left in {uri}"}
        return (200, {}) if path.endswith("log-batch") else (404, {"error_code": "ENDPOINT_NOT_FOUND"})

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the test's stderr."""


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[Tracker]:
    with Tracker(tmp_path / "artifacts") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_no_secret_is_shown_stored_logged_or_sent(
    tmp_path: Path, tracker: Tracker, tiny_model: Callable[..., Path], text: Path, held_out: Path
) -> None:
    uri = f"http://{USER}:{PASSWORD}@127.0.0.1:{tracker.server_address[1]}"
    sizes = ("--samples", SAMPLES, "--length", LENGTH, "--microbatch", MICROBATCH, "--shards", 1)
    given = ("prune", tiny_model(), "--output", tmp_path / "out", "--calibration", text, "--eval", held_out)
    command = Command([*given, *sizes, "--json"], SECRETS | {"MLFLOW_TRACKING_URI": uri}, tmp_path)
    command.until(r"1/\d+ blocks")
    arguments = [" ".join(member.cmdline()) for member in running(command)]
    (home,) = {found[1] for line in arguments if (found := re.search(r"(/[^\s=]*/espalier-\w+)/ray", line))}
    logs = [path for path in Path(home).rglob("*") if path.is_file()]
    shown = {str(path): path.read_bytes() for path in logs}
    code, out = command.finish()

    assert code == 0, "\n".join(command.lines)
    assert tracker.users == {f"{USER}:{PASSWORD}"}  # the run itself used the whole URI
    assert any("ShardWorker" in line for line in arguments) and any(path.name.startswith("raylet") for path in logs)
    shown |= {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    shown |= {f"process {number}": line.encode() for number, line in enumerate(arguments)}
    shown |= {f"request {number}": line.encode() for number, line in enumerate(tracker.sent)}
    shown |= {"stderr": "\n".join(command.lines).encode(), "stdout": out.encode()}
    assert [name for name, content in shown.items() if PLANTED.encode() in content] == []

    run = json.loads((tmp_path / "out" / "espalier" / "run.json").read_text())
    assert run["tracking_uri"] == uri.replace(f"{USER}:{PASSWORD}@", "")
    assert any("no room left in mysql://database/mlflow" in warning for warning in run["warnings"])
    artifacts = {path.name for path in tracker.artifacts.rglob("*")}
    assert {"run.json", "report.md"} <= artifacts and any("espalier.run_id" in line for line in tracker.sent)


def running(command: Command) -> list[psutil.Process]:
    """The run's processes that can still be looked at."""
    return [member for member in command.family() if member.status() != psutil.STATUS_ZOMBIE]
