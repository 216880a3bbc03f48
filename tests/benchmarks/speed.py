"""One-shot pruning on two shards of one thread: stream, masks and commit, beside llm-compressor's oneshot.

    python tests/benchmarks/speed.py [--peer-python ENV/bin/python] [--criterion sparsegpt] [--pattern 2:4] [--repeat 3]

The peer uses as many threads as we do in all. Runs alternate, so that both see the same machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_model import SMALL, make_llama, report, token_ids

from pipeline import PruneConfig, prune

SAMPLES, LENGTH = 32, 512


def ours(model: Path, scratch: Path, arguments: argparse.Namespace) -> float:
    """Seconds of stream and work (the work commits)."""
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{scratch}/mlflow.db"
    with tempfile.TemporaryDirectory(dir=scratch) as output:
        target = {"pattern": arguments.pattern} if arguments.pattern else {"sparsity": 0.5}
        result = prune(
            PruneConfig(
                model=str(model),
                output=f"{output}/pruned",
                calibration=token_ids(SAMPLES, LENGTH, SMALL["vocab"]),
                samples=SAMPLES,
                length=LENGTH,
                criterion=arguments.criterion,
                reconstruct="none",
                shards=arguments.shards,
                threads=1,
                **target,
            )
        )
    seconds = result.run["seconds"]
    print(f"  espalier  stream {seconds['stream']:6.2f} s  work {seconds['work']:6.2f} s", flush=True)
    return seconds["stream"] + seconds["work"]


def peer(python: str, model: Path, arguments: argparse.Namespace) -> float:
    """Seconds of the peer's oneshot call."""
    script = Path(__file__).with_name("peer_oneshot.py")
    values = [arguments.criterion, arguments.pattern or "0:0", SAMPLES, LENGTH, arguments.shards]
    # No environment of ours: the two have different packages.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL"))}
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [python, script, str(model), *map(str, values)],
            capture_output=True, text=True, env=environment, cwd=directory,
        )  # fmt: skip
    line = next((line for line in done.stdout.splitlines() if line.startswith("PEER ")), None)
    if line is None:
        sys.exit(f"the peer failed:\n{done.stderr[-2000:]}")
    seconds = float(json.loads(line[5:])["seconds"])
    print(f"  llm-compressor oneshot {seconds:6.2f} s", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="the Python of an environment with llmcompressor; without it, no peer")
    parser.add_argument("--criterion", choices=["wanda", "sparsegpt"], default="wanda")
    parser.add_argument("--pattern", help="such as 2:4; default: 50 % of each row")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "espalier-bench")
    arguments = parser.parse_args()
    model = make_llama(arguments.scratch / "llama-111m")
    if not arguments.peer_python:
        print("no --peer-python: the peer is left out")
    mine, theirs = [], []
    for _ in range(arguments.repeat):
        mine.append(ours(model, arguments.scratch, arguments))
        if arguments.peer_python:
            theirs.append(peer(arguments.peer_python, model, arguments))
    result = {
        "espalier_seconds": mine,
        "peer_seconds": theirs,
        "criterion": arguments.criterion,
        "pattern": arguments.pattern,
    }
    if theirs:
        result["ratio"] = statistics.median(mine) / statistics.median(theirs)
        print(
            f"median {statistics.median(mine):.2f} s against {statistics.median(theirs):.2f} s: {result['ratio']:.2f}"
        )
    report("speed", result)


if __name__ == "__main__":
    main()
