"""One-shot pruning on two shards of one thread: stream, masks and commit, beside llm-compressor's oneshot.

    python tests/benchmarks/speed.py [--peer-python ENV/bin/python] [--criterion sparsegpt] [--pattern 2:4] [--repeat 3]
    python tests/benchmarks/speed.py --compute fp32 bf16 [--isa AVX2] [--samples 1]

The peer uses as many threads as we do in all. Runs alternate, so that all see the same machine. `--isa` limits oneDNN
and MKL to the instructions of a lesser processor, where bf16 products are imitated.
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

from espalier import PruneConfig, prune

SAMPLES, LENGTH = 32, 512


def ours(model: Path, scratch: Path, arguments: argparse.Namespace, compute: str) -> dict[str, float]:
    """Seconds of the pass and of the work, which takes the calibration through the blocks and commits them; and of the
    blocks' own parts of it, over both shards."""
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{scratch}/mlflow.db"
    with tempfile.TemporaryDirectory(dir=scratch) as output:
        target = {"pattern": arguments.pattern} if arguments.pattern else {"sparsity": 0.5}
        result = prune(
            PruneConfig(
                model=str(model),
                output=f"{output}/pruned",
                calibration=token_ids(arguments.samples, LENGTH, SMALL["vocab"]),
                samples=arguments.samples,
                length=LENGTH,
                criterion=arguments.criterion,
                solve="off",  # the peer's SparseGPT ends with its own update
                reconstruct="none",
                shards=arguments.shards,
                threads=1,
                compute=compute,
                **target,
            )
        )
    seconds = result.run["seconds"]
    stream, work = seconds["stream"], seconds["work"]
    print(f"  espalier {result.run['compute']:4}  stream {stream:6.2f} s  work {work:6.2f} s", flush=True)
    blocks = result.run["blocks"]
    through, masks = (sum(block["seconds"][part] for block in blocks) for part in ("stream", "mask"))
    return {"stream": stream, "work": work, "through": through, "masks": masks}


def peer(python: str, model: Path, arguments: argparse.Namespace) -> float:
    """Seconds of the peer's oneshot call."""
    script = Path(__file__).with_name("peer_oneshot.py")
    values = [arguments.criterion, arguments.pattern or "0:0", arguments.samples, LENGTH, arguments.shards]
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
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--compute", nargs="+", default=["auto"], choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--isa", choices=["AVX2"], help="imitate a processor that has no more than these instructions")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "espalier-bench")
    arguments = parser.parse_args()
    if arguments.isa:  # before the first product; the shards' processes inherit it
        os.environ |= {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    model = make_llama(arguments.scratch / "llama-111m")
    if not arguments.peer_python:
        print("no --peer-python: the peer is left out")
    theirs: list[float] = []
    runs: dict[str, list[dict[str, float]]] = {compute: [] for compute in arguments.compute}
    for _ in range(arguments.repeat):
        for compute in arguments.compute:
            runs[compute].append(ours(model, arguments.scratch, arguments, compute))
        if arguments.peer_python:
            theirs.append(peer(arguments.peer_python, model, arguments))
    mine = [seconds["stream"] + seconds["work"] for seconds in runs[arguments.compute[0]]]
    result = {
        "espalier_seconds": mine,
        "compute": runs,
        "isa": arguments.isa,
        "peer_seconds": theirs,
        "criterion": arguments.criterion,
        "pattern": arguments.pattern,
    }
    if theirs:
        result["ratio"] = statistics.median(mine) / statistics.median(theirs)
        print(
            f"median {statistics.median(mine):.2f} s against {statistics.median(theirs):.2f} s: {result['ratio']:.2f}"
        )
    first, *others = arguments.compute
    for other in others:
        slower = {
            phase: statistics.median(run[phase] for run in runs[other])
            / statistics.median(run[phase] for run in runs[first])
            for phase in ("through", "masks")
        }
        result[f"{other}_over_{first}"] = slower
        print(f"{other} takes {slower['through']:.2f} times {first}'s passes, {slower['masks']:.2f} times its masks")
    report("speed", result)


if __name__ == "__main__":
    main()
