"""A real Ray cluster of two raylets with token authentication, for every test that asks for `two_raylets`; and a small
run whose bytes are known."""

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from whole_runs import LENGTH, MICROBATCH, SAMPLES, add_tokenizer, prune_without_ray, write_text

from espalier.pipeline.config.prune import PruneConfig

CPUS_EACH = 2  # logical: what Ray may schedule, not cores
STARTUP_SECONDS = 120


@dataclass
class TwoRaylets:
    """`address` is for ray.init, `dashboard_url` for jobs; `token_path` holds the token that both ask for."""

    address: str
    dashboard_url: str
    token_path: Path
    home: Path
    process: subprocess.Popen[str]

    def kill_node(self, number: int) -> None:
        """SIGKILL to one raylet; 0 is the head's. Its workers die with it. Add one again for the tests that follow."""
        self._ask(f"kill {number}")

    def add_node(self) -> int:
        """Starts one more raylet and gives its number for `kill_node`."""
        return int(self._ask("add")["raylets"]) - 1

    def _ask(self, command: str) -> dict[str, int]:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return _answer(self.process, self.home)


@pytest.fixture(scope="session")
def two_raylets() -> Iterator[TwoRaylets]:
    """The cluster, started once for the whole session (about 15 s), gone with it whatever happens in the tests."""
    home = Path(tempfile.mkdtemp(prefix="esp", dir="/tmp"))  # short: Ray puts sockets under it
    script = Path(__file__).parents[1] / "support" / "two_raylets.py"
    with open(home / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, str(script), str(home), str(CPUS_EACH)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=home,  # not the clone: what a job imports must have been shipped
        )
    try:
        started = _answer(process, home)
        yield TwoRaylets(
            address=started["address"],
            dashboard_url=started["dashboard_url"],
            token_path=Path(started["token_path"]),
            home=home,
            process=process,
        )
    finally:
        _end(process)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def member(two_raylets: TwoRaylets, monkeypatch: pytest.MonkeyPatch) -> TwoRaylets:
    """The cluster, with the environment of somebody who has its token."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(two_raylets.token_path))
    return two_raylets


@pytest.fixture
def stranger(two_raylets: TwoRaylets, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> TwoRaylets:
    """The cluster, with the environment of somebody who has another token."""
    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 64)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(wrong))
    return two_raylets


def _answer(process: subprocess.Popen[str], home: Path) -> dict:
    assert process.stdout is not None
    line = process.stdout.readline()  # ends with the process, so this cannot wait for ever on a dead one
    assert line, f"the cluster did not start:\n{(home / 'log').read_text()[-4000:]}"
    return json.loads(line)


def _end(process: subprocess.Popen[str]) -> None:
    """Closes the input, which ends the cluster, and then ends by id whatever of it is left."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    process.kill()
    process.wait()
    _, left = psutil.wait_procs(family, timeout=5)
    for survivor in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            survivor.kill()
    psutil.wait_procs(left, timeout=5)


@pytest.fixture(scope="session")
def wanted(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The options of a small run, but for its output."""
    home = tmp_path_factory.mktemp("wanted")
    model = home / "model"
    model.mkdir()
    for file in tiny_checkpoint().iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    add_tokenizer(model)
    return {
        "model": str(model),
        "calibration": str(write_text(home / "text.txt", 4000, seed=1)),
        "eval": str(write_text(home / "held-out.txt", 500, seed=2)),
        "samples": SAMPLES,
        "length": LENGTH,
        "microbatch": MICROBATCH,
    }


@pytest.fixture(scope="session")
def expected(wanted: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return prune_without_ray(PruneConfig(**wanted, output=str(tmp_path_factory.mktemp("expected") / "out")))
