"""SIGTERM and SIGHUP at moments spread over a command: how it ends, what is left of it, and what resuming gives.

tests/benchmarks/signals.py does the same at random moments.
"""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from whole_runs import LENGTH, MICROBATCH, SAMPLES, Command, Listener, alive, prune_without_ray, weights_of

from espalier.cluster.connection.folders import PREFIX
from espalier.cluster.rank_group import RankGroup
from espalier.pipeline.cli import main as cli
from espalier.pipeline.config.prune import PruneConfig
from espalier.pipeline.config.retrain import RetrainConfig
from espalier.pipeline.pruning import prune as driver
from espalier.pipeline.pruning.prune import resume
from espalier.pipeline.retraining import run as retraining
from espalier.pipeline.run.directory import RunDirectory
from espalier.pipeline.run.stopping import how_to_go_on

EPOCHS = 3
SECONDS = 10.0  # promised between the signal and the end
SIZES = ("--length", LENGTH, "--microbatch", MICROBATCH)


@pytest.fixture(scope="module")
def expected(tiny_model: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("expected") / "out"
    sizes = {"samples": SAMPLES, "length": LENGTH, "microbatch": MICROBATCH, "epochs": EPOCHS}
    return prune_without_ray(PruneConfig(model=str(tiny_model()), output=str(out), calibration=str(text), **sizes))


@pytest.fixture
def command(database: str, tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """start(arguments) -> the running command; killed after the test."""
    started: list[Command] = []

    def start(*arguments: object) -> Command:
        started.append(Command(arguments, {"MLFLOW_TRACKING_URI": database, "TMPDIR": str(tmp_path)}, tmp_path))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.kill()


@pytest.fixture
def pruning(command: Callable[..., Command], tiny_model: Callable[..., Path], text: Path, tmp_path: Path) -> Command:
    given = ("--output", tmp_path / "out", "--calibration", text, "--samples", SAMPLES, "--epochs", EPOCHS)
    return command("prune", tiny_model(), *given, "--shards", 1, *SIZES)


def wait_for(run: Command, condition: Callable[[Command], bool]) -> None:
    """Looks again and again, for as long as the command lives."""
    while not condition(run):
        assert run.process.poll() is None, run.finish()


def ends(run: Command, number: signal.Signals) -> None:
    """Sends the signal, twice, and holds the command to all that is promised about its end but its last line."""
    run.process.send_signal(signal.SIGSTOP)  # it does no more while its family is looked up
    family = run.family()
    start = time.monotonic()
    run.process.send_signal(number)
    run.process.send_signal(signal.SIGCONT)
    with contextlib.suppress(ProcessLookupError):
        run.process.send_signal(number)
    code, _ = run.finish()
    assert time.monotonic() - start < SECONDS
    assert code == 128 + number, "\n".join(run.lines)
    assert alive(family) == []
    assert not any("Traceback" in line or "SIG" in line for line in run.lines), "\n".join(run.lines)
    assert run.lines[-1].startswith("espalier: interrupted")


def states_in_mlflow(database: str, run_file: Path) -> list[str]:
    """The status of each MLflow run that the run of this directory made: none, or one."""
    from mlflow import MlflowClient

    client, run = MlflowClient(tracking_uri=database), json.loads(run_file.read_text())
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    own = client.search_runs(experiments, f"tags.`espalier.run_id` = '{run['run_id']}'")
    return [one.info.status for one in own]


def test_a_command_that_is_still_being_imported_ends_at_once(pruning: Command, tmp_path: Path) -> None:
    wait_for(pruning, Command.listens)
    ends(pruning, signal.SIGTERM)
    assert pruning.lines[-1].startswith("espalier: interrupted") and not (tmp_path / "out").exists()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("moment", ["Ray starts", " 2/4 blocks"])
def test_a_pruning_run_ends_whenever_it_is_told_to_and_resumes_to_the_same_bytes(
    pruning: Command, moment: str, expected: dict[str, str], tmp_path: Path, one_cluster: None, recorded: str
) -> None:
    if moment == "Ray starts":
        wait_for(pruning, lambda run: any(child.name() == "gcs_server" for child in run.family()))
    else:
        pruning.until(moment)
    ends(pruning, signal.SIGTERM)
    assert pruning.lines[-1] == f"espalier: interrupted; `espalier resume {tmp_path / 'out'}` goes on"
    run_file = tmp_path / "out" / "espalier" / "run.json"
    assert json.loads(run_file.read_text())["status"] == "interrupted"
    assert states_in_mlflow(recorded, run_file) in ([], ["KILLED"])
    assert moment != " 2/4 blocks" or states_in_mlflow(recorded, run_file) == ["KILLED"]
    assert not list(tmp_path.glob(f"{PREFIX}*"))
    assert weights_of(resume(tmp_path / "out").output) == expected
    assert json.loads(run_file.read_text())["status"] == "finished"
    assert states_in_mlflow(recorded, run_file) == ["FINISHED"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_training_run_ends_between_its_checkpoints_and_resumes_to_the_same_weights(
    command: Callable[..., Command],
    tiny_model: Callable[..., Path],
    text: Path,
    tmp_path: Path,
    two_ranks: RankGroup,
    recorded: str,
) -> None:
    out, steps = tmp_path / "out", 200
    asked = {"data": text, "steps": steps, "batch": 4, "length": LENGTH, "checkpoint_every": 5, "seed": 3}
    flags = [str(part) for name, value in asked.items() for part in (f"--{name.replace('_', '-')}", value)]
    run = command("retrain", tiny_model(), "--output", out, "--ranks", 2, *flags)
    wait_for(run, lambda _: any((out / "espalier").glob("checkpoint-*")))
    ends(run, signal.SIGTERM)
    assert run.lines[-1] == f"espalier: interrupted; `espalier resume {out}` goes on"
    run_file = out / "espalier" / "run.json"
    assert json.loads(run_file.read_text())["status"] == "interrupted"
    assert states_in_mlflow(recorded, run_file) == ["KILLED"]
    assert list((out / "espalier").glob("checkpoint-*")) and not list(out.glob("*.safetensors"))
    notes = Listener()
    result = retraining.resume(out, notes, two_ranks)
    assert any(note.startswith("going on after step ") for note in notes.notes)
    assert states_in_mlflow(recorded, run_file) == ["FINISHED"]
    whole = RetrainConfig(model=str(tiny_model()), output=str(tmp_path / "whole"), **asked | {"data": str(text)})
    assert result.losses == (undisturbed := retraining.retrain(whole, Listener(), two_ranks)).losses
    assert weights_of(out) == weights_of(undisturbed.output)


@pytest.mark.ray
@pytest.mark.slow
def test_an_evaluation_ends_with_the_terminal_that_it_runs_in(
    command: Callable[..., Command], tiny_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    run = command("eval", tiny_model(), "--data", text, *SIZES)
    run.until(r"^evaluate tiny +\d")
    ends(run, signal.SIGHUP)
    assert run.lines[-1] == "espalier: interrupted; give the same command again"
    assert not list(tmp_path.glob(f"{PREFIX}*"))


@pytest.mark.ray
@pytest.mark.slow
def test_an_experiment_ends_with_the_training_that_it_is_in_and_says_how_the_whole_goes_on(
    command: Callable[..., Command], text: Path, database: str, tmp_path: Path
) -> None:
    sizes = ("--steps", 5000, "--batch", 4, "--length", LENGTH, "--ranks", 1)
    run = command("track", "shakespeare-small", "--data", text, "--output", tmp_path / "out", *sizes)
    run.until(r"^step ")
    ends(run, signal.SIGTERM)
    assert run.lines[-1] == f"espalier: interrupted; `espalier resume {tmp_path / 'out'}` goes on"
    for part in (tmp_path / "out", tmp_path / "out" / "trained"):
        run_file = part / "espalier" / "run.json"
        assert json.loads(run_file.read_text())["status"] == "interrupted"
        assert states_in_mlflow(database, run_file) == ["KILLED"]


HANGS = """
import sys, time
from espalier.pipeline.run import stopping

stopping.END_SECONDS = 1.0
stopping.WAKE_SECONDS = 0.1

def leave():
    return "`espalier resume out` goes on"

with stopping.raising_on_signals(), stopping.at_the_last(leave):
    swallowed = -1  # from here on an interruption is swallowed, so it is ready in the loop
    while swallowed < int(sys.argv[1]):
        try:
            if swallowed < 0:
                swallowed = 0
                print("ready", flush=True)
            time.sleep(600)
        except BaseException:
            swallowed += 1
    time.sleep(600)
"""


@pytest.mark.parametrize(("swallowed", "hard"), [(2, False), (1000, True)])
def test_a_process_that_swallows_the_interruption_is_interrupted_again_and_in_the_end_ended(
    swallowed: int, hard: bool
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS, str(swallowed)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.terminate()
    _, said = process.communicate(timeout=60)
    if hard:
        assert (process.returncode, said) == (143, "espalier: interrupted; `espalier resume out` goes on\n")
    else:
        assert said.strip().endswith("Stopped: SIGTERM"), "it came out as any exception does"


def test_a_process_that_was_started_deaf_to_hangups_stays_so() -> None:
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + HANGS
    process = subprocess.Popen(
        [sys.executable, "-c", code, "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert said.strip().endswith("Stopped: SIGTERM")


def test_a_run_is_finished_when_all_is_done_and_not_when_its_run_json_says_so_first(tmp_path: Path) -> None:
    """It does on its way to MLflow."""
    run = {"status": "running", "config": {}, "fingerprint": None}
    for name, end in (("early", RunDirectory.write), ("done", RunDirectory.finish)):
        directory = RunDirectory.claim(tmp_path / name, run)
        with pytest.raises(KeyboardInterrupt) as stop, directory.at_work():
            end(directory, run | {"status": "finished"})
            raise KeyboardInterrupt
        status = json.loads(directory.run_file.read_text())["status"]
        said = how_to_go_on(stop.value)
        if name == "early":
            assert (status, said) == ("interrupted", f"`espalier resume {tmp_path / name}` goes on")
        else:
            assert (status, said) == ("finished", f"the run in {tmp_path / name} is finished")


def test_ctrl_c_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def at_work(*_: object) -> None:
        run = {"status": "running", "config": {}, "fingerprint": None}
        with RunDirectory.claim(tmp_path / "a b", run).at_work():
            raise KeyboardInterrupt

    arguments = ["prune", "m", "--output", "o", "--calibration", "c"]
    for broken, says in (interrupted, "give the same command again"), (at_work, f"`espalier resume '{tmp_path}/a b'`"):
        monkeypatch.setattr(driver, "prune", broken)
        assert cli.main(arguments) == 130
        assert capsys.readouterr().err.startswith(f"espalier: interrupted; {says}")
    assert json.loads((tmp_path / "a b" / "espalier" / "run.json").read_text())["status"] == "interrupted"
