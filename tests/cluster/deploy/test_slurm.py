"""The Slurm script, really run: two nodes, a token, a pruning run over both, nothing left behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from slurm_stand_in import SlurmStandIn, slurm_stand_in
from whole_runs import prune_line, weights_of

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "cluster" / "deploy"
DYING_SECONDS = 10
GIVE_UP_SECONDS = 400  # for what takes forty on an idle machine


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[SlurmStandIn]:
    if not (Path(sys.prefix) / "bin" / "activate").exists():
        pytest.skip("the script activates a virtual environment, and the tests run in none")
    folder = tmp_path / "slurm"
    folder.mkdir()
    with slurm_stand_in(folder, ROOT, Path(sys.prefix)) as stand_in:
        yield stand_in


def end(process: subprocess.Popen[str], slurm: SlurmStandIn) -> list[psutil.Process]:
    """Ends by id what is left of the job, and gives what did not end by itself."""
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    for pid in slurm.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            family.append(psutil.Process(pid))
    _, unreaped = psutil.wait_procs(family, timeout=0 if process.poll() is None else DYING_SECONDS)
    left = []
    for survivor in unreaped:
        with contextlib.suppress(psutil.NoSuchProcess):
            if survivor.status() != psutil.STATUS_ZOMBIE:
                left.append(survivor)
                survivor.kill()
    process.kill()
    return left


def submitted(slurm: SlurmStandIn, tmp_path: Path, *command: str, stop_at: str | None = None) -> tuple[int, str]:
    """Exit code and output of the script as `sbatch` runs it: in a session of its own, from somewhere. Its step is told
    to stop, as before the time limit, when a line begins with `stop_at`."""
    variables = slurm.environment | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    process = subprocess.Popen(
        ["bash", str(DEPLOY / "slurm.sh"), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=variables,
        cwd=tmp_path,
        start_new_session=True,
    )
    timer = threading.Timer(GIVE_UP_SECONDS, end, (process, slurm))
    timer.start()
    lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if stop_at and line.startswith(stop_at):
                stop_at = None
                step = [child for child in psutil.Process(process.pid).children() if "srun" in child.cmdline()[1]]
                for pid in slurm.processes() or [child.pid for child in step]:  # Slurm signals all of a step's
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM)
        process.wait()
    finally:
        timer.cancel()
        left = end(process, slurm)
    assert left == [], "the job leaves nothing that runs"
    assert not list(Path(slurm.environment["HOME"], ".ray").iterdir()), "its token goes with it"
    return process.returncode, "".join(lines)


@pytest.mark.ray
@pytest.mark.slow
def test_a_slurm_job_over_two_nodes_gives_the_bytes_of_one_process_and_leaves_nothing(
    slurm: SlurmStandIn, wanted: dict[str, Any], expected: dict[str, str], tmp_path: Path
) -> None:
    code, output = submitted(slurm, tmp_path, *prune_line(wanted, output=tmp_path / "out", shards=3))  # two a node
    assert code == 0, output[-4000:]
    assert weights_of(tmp_path / "out") == expected
    run = json.loads((tmp_path / "out" / "espalier" / "run.json").read_text())
    assert len(run["shards"]) == 3
    if slurm.namespaces:  # else both nodes have this machine's address
        assert sorted({shard["node"] for shard in run["shards"]}) == slurm.addresses


@pytest.mark.ray
@pytest.mark.slow
def test_a_slurm_job_that_is_told_to_stop_says_how_to_go_on_and_ends_with_the_signals_code(
    slurm: SlurmStandIn, wanted: dict[str, Any], tmp_path: Path
) -> None:
    command = prune_line(wanted, output=tmp_path / "out", shards=2, epochs=30)
    code, output = submitted(slurm, tmp_path, *command, stop_at="block ")
    assert code == 143, output[-4000:]
    assert f"espalier resume {tmp_path / 'out'}" in output
    assert json.loads((tmp_path / "out" / "espalier" / "run.json").read_text())["status"] == "interrupted"


@pytest.mark.parametrize("script", ["node.sh", "slurm.sh"])
def test_the_scripts_are_read_by_bash(script: str) -> None:
    assert subprocess.run(["bash", "-n", str(DEPLOY / script)], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize(
    ("arguments", "token", "said"),
    [
        (["0", "2"], "t", "give RANK, NODES, HEAD and an espalier command"),
        (["1", "2", "127.0.0.1", "doctor"], "", "RAY_AUTH_TOKEN_PATH"),
        (["1", "2", "127.0.0.1", "doctor"], "t", "no Ray at 127.0.0.1:1 for 0 s"),
        (["1", "2", "no-such.invalid", "doctor"], "t", "HEAD no-such.invalid: no address of that name"),
    ],
)
def test_a_node_that_cannot_join_says_why_in_its_last_line(
    arguments: list[str], token: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(token)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"), "RAY_PORT": "1", "JOIN_SECONDS": "0", "PATH": path}
    command = ["bash", str(DEPLOY / "node.sh"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(f"node.sh: {said}"), done.stderr
