"""SIGTERM or SIGHUP at random moments of a command at work: the exit code, the seconds to the end, what is left, what
resuming gives.

Usage: python tests/benchmarks/signals.py [--command prune] [--moments 20] [--signal SIGTERM] [--seed 1] [--between 0 1]
A moment is drawn from the time between the command's first statement, where it begins to listen (before torch is even
imported), and the end of the shortest of three undisturbed runs, or from a part of it. Where the command was quicker
than its moment, another is drawn: each that counts has met it at work. Prints one line a moment and the worst of all;
exit code 1 if one is not as promised.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from conftest import tiny_config
from whole_runs import LENGTH, MICROBATCH, SAMPLES, Command, add_tokenizer, alive, weights_of, write_text

SECONDS = 10.0  # promised between the signal and the end
UNDISTURBED = 3
WINDOWS = ("--length", LENGTH)
TRAINED = ("--batch", 4, *WINDOWS, "--ranks", 1)
SIZES: dict[str, tuple[object, ...]] = {
    "prune": (*WINDOWS, "--samples", SAMPLES, "--microbatch", MICROBATCH, "--epochs", 200, "--shards", 2),
    "retrain": (*TRAINED, "--steps", 300, "--checkpoint-every", 50),
    "track": (*TRAINED, "--steps", 200),
    "eval": (*WINDOWS, "--microbatch", 1),
}


@dataclass(frozen=True)
class Bench:
    """One command in a home of its own, which is the TMPDIR of all that it starts."""

    command: str
    home: Path

    def prepare(self) -> None:
        write_text(self.home / "text.txt", 8000, seed=1)
        if self.command != "track":
            model(self.home / "model")

    def start(self, output: Path) -> Command:
        model, text = self.home / "model", self.home / "text.txt"
        texts = "--calibration" if self.command == "prune" else "--data"
        named = "shakespeare-small" if self.command == "track" else model
        written = () if self.command == "eval" else ("--output", output)
        arguments = (self.command, named, texts, text, *written, *SIZES[self.command])
        return Command(arguments, {"TMPDIR": str(self.home)}, self.home)

    def left(self, family: list[psutil.Process]) -> list[str]:
        """Processes and scratch folders that a run has left behind."""
        ours = [*family, *(one for one in psutil.process_iter() if self._ours(one))]
        return [*alive(list(dict.fromkeys(ours))), *(path.name for path in self.home.glob("espalier-*"))]

    def _ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("TMPDIR") == str(self.home)
        except psutil.Error:
            return False


def main(command: str, moments: int, number: signal.Signals, seed: int, between: tuple[float, float]) -> int:
    home = Path(tempfile.mkdtemp(prefix="signals-", dir="/tmp"))
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{home / 'mlflow.db'}"
    try:
        return measure(Bench(command, home), moments, number, random.Random(seed), between)
    finally:
        shutil.rmtree(home)


def measure(
    bench: Bench, moments: int, number: signal.Signals, chosen: random.Random, between: tuple[float, float]
) -> int:
    bench.prepare()
    expected = bench.home / "expected"
    wholes = list(undisturbed(bench, expected))
    print(f"{bench.command}, undisturbed: {', '.join(f'{whole:.1f}' for whole in wholes)} s", flush=True)
    worst, faults, met, drawn = 0.0, 0, 0, 0
    while met < moments:
        drawn += 1
        output, moment = bench.home / f"out-{drawn}", chosen.uniform(*(share * min(wholes) for share in between))
        run = bench.start(output)
        listening(run)
        time.sleep(moment)
        if run.process.poll() is None:
            code, seconds, family = stopped(run, number)
        if run.process.returncode == 0:
            print(f"{moment:6.2f} s: had finished", flush=True)
            continue
        met += 1
        left, states, finished_before = bench.left(family), mlflow_states(output), finished(output)
        same = bench.command == "eval" or resumed(output, expected)
        ends = "FINISHED" if finished_before else "KILLED"
        good = code == 128 + number and seconds < SECONDS and not left and same and set(states) <= {ends}
        worst, faults = max(worst, seconds), faults + (not good)
        told = f"exit {code}, {seconds:.2f} s, left {left}, MLflow {states}, same bytes {same}"
        print(f"{moment:6.2f} s: {told}; {run.lines[-1] if run.lines else ''}", flush=True)
        if not good:
            print("\n".join(run.lines))
    print(
        f"{number.name} at {met} moments ({drawn - met} came too late), {faults} not as promised, worst {worst:.2f} s"
    )
    return int(faults > 0)


def undisturbed(bench: Bench, output: Path) -> Iterator[float]:
    """Seconds from listening to the end of some runs, the last of which leaves `output`."""
    for _ in range(UNDISTURBED):
        shutil.rmtree(output, ignore_errors=True)
        run = bench.start(output)
        listening(run)
        began = time.monotonic()
        code, _ = run.finish()
        assert code == 0, run.lines
        yield time.monotonic() - began


def listening(run: Command) -> None:
    while not run.listens():
        assert run.process.poll() is None, run.finish()


def stopped(run: Command, number: signal.Signals) -> tuple[int, float, list[psutil.Process]]:
    """(exit code, seconds from the signal to the end, the processes that there were)."""
    run.process.send_signal(signal.SIGSTOP)  # it does no more while its family is looked up
    family = run.family()
    began = time.monotonic()
    run.process.send_signal(number)
    run.process.send_signal(signal.SIGCONT)
    code, _ = run.finish()
    return code, time.monotonic() - began, family


def resumed(output: Path, expected: Path) -> bool:
    """Whether `espalier resume`, where there is something to resume, gives the same bytes and finishes MLflow's run."""
    if not (output / "espalier" / "run.json").exists():
        return not output.exists()
    if not finished(output):  # the signal may have met only the process's own end
        command = [sys.executable, "-m", "espalier", "resume", str(output), "--debug"]
        again = subprocess.run(command, capture_output=True, text=True)
        if again.returncode:
            print(again.stderr)
            return False
    folders = {file.parent.relative_to(expected) for file in expected.rglob("*.safetensors")}
    same = all(weights_of(output / folder) == weights_of(expected / folder) for folder in folders)
    return bool(folders) and same and mlflow_states(output) == ["FINISHED"]


def finished(output: Path) -> bool:
    run_file = output / "espalier" / "run.json"
    return run_file.exists() and json.loads(run_file.read_text())["status"] == "finished"


def mlflow_states(output: Path) -> list[str]:
    """The status of each MLflow run that the command made of itself (not of the parts of `track`): none, or one."""
    from mlflow import MlflowClient

    run_file = output / "espalier" / "run.json"
    if not run_file.exists():
        return []
    run_id = json.loads(run_file.read_text())["run_id"]
    client = MlflowClient()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return [run.info.status for run in client.search_runs(experiments, f"tags.`espalier.run_id` = '{run_id}'")]


def model(directory: Path) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("llama", False, 4, 32)).save_pretrained(directory)
    add_tokenizer(directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--command", choices=SIZES, default="prune")
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--signal", choices=["SIGTERM", "SIGHUP"], default="SIGTERM")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--between", type=float, nargs=2, default=(0.0, 1.0), help="shares of the shortest run")
    given = parser.parse_args()
    sys.exit(main(given.command, given.moments, signal.Signals[given.signal], given.seed, tuple(given.between)))
