"""SIGTERM at random moments of a pruning run: the exit code, the seconds to the end, what is left, what resuming gives.

Usage: python tests/benchmarks/signals.py [--moments 20] [--seed 1]. A moment is a share of the time that an undisturbed
run takes. Prints one line a moment and the worst of all; exit code 1 if one is not as promised.
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
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import tiny_config
from whole_runs import LENGTH, MICROBATCH, SAMPLES, Command, add_tokenizer, alive, weights_of, write_text

SECONDS = 10.0


def main(moments: int, seed: int) -> int:
    home = Path(tempfile.mkdtemp(prefix="signals-", dir="/tmp"))
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{home / 'mlflow.db'}"
    try:
        return measure(home, moments, random.Random(seed))
    finally:
        shutil.rmtree(home)


def measure(home: Path, moments: int, chosen: random.Random) -> int:
    model(home / "model")
    text = write_text(home / "text.txt", 4000, seed=1)
    sizes = ("--samples", SAMPLES, "--length", LENGTH, "--microbatch", MICROBATCH, "--epochs", 10, "--shards", 2)

    def start(output: Path) -> Command:
        arguments = ("prune", home / "model", "--output", output, "--calibration", text, *sizes)
        return Command(arguments, {"TMPDIR": str(home)}, home)

    began = time.monotonic()
    undisturbed = start(home / "expected")
    assert undisturbed.finish()[0] == 0, undisturbed.lines
    whole, expected = time.monotonic() - began, weights_of(home / "expected")
    print(f"undisturbed: {whole:.1f} s")
    worst, faults = 0.0, 0
    for number in range(moments):
        output, moment = home / f"out-{number}", chosen.uniform(0, whole)
        run = start(output)
        time.sleep(moment)
        family = run.family() if run.process.poll() is None else []
        began = time.monotonic()
        run.process.send_signal(signal.SIGTERM)
        code, _ = run.finish()
        seconds = time.monotonic() - began
        left = [*alive(family), *home.glob("espalier-*")]
        states = mlflow_states(output)
        same = resumed(output, expected)
        # Before Python is up there is no handler: the signal ends it, which a shell reports as 143 too.
        good = code in (143, -15, 0) and seconds < SECONDS and not left and same
        good = good and (states == ["FINISHED"] if code == 0 else set(states) <= {"KILLED"})
        worst, faults = max(worst, seconds), faults + (not good)
        said = run.lines[-1] if run.lines else ""
        print(
            f"{moment:6.2f} s: exit {code}, {seconds:.2f} s, left {left}, MLflow {states}, same bytes {same}; {said}",
            flush=True,
        )
        if not good:
            print("\n".join(run.lines))
    print(f"{moments} moments, {faults} not as promised, the slowest end {worst:.2f} s")
    return int(faults > 0)


def resumed(output: Path, expected: dict[str, str]) -> bool:
    """Whether `espalier resume`, where there is something to resume, gives the same bytes."""
    run_file = output / "espalier" / "run.json"
    if not run_file.exists():
        return not output.exists()
    if json.loads(run_file.read_text())["status"] != "finished":
        subprocess.run([sys.executable, "-m", "pipeline", "resume", str(output)], check=True, capture_output=True)
    return weights_of(output) == expected


def mlflow_states(output: Path) -> list[str]:
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
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    sys.exit(main(given.moments, given.seed))
