"""Two shards against one, one thread each, with reconstruction: seconds of stream and work.

    python tests/benchmarks/scaling.py [--samples 32] [--length 512] [--shards 1 2]

Also checks that both gave the same bytes.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from bench_model import SMALL, make_llama, report, token_ids

from pipeline import PruneConfig, prune


def run(model: Path, output: Path, shards: int, samples: int, length: int) -> dict[str, Any]:
    """run.json of a run on so many shards."""
    result = prune(
        PruneConfig(
            model=str(model),
            output=str(output),
            calibration=token_ids(samples, length, SMALL["vocab"]),
            samples=samples,
            length=length,
            shards=shards,
            threads=1,
        )
    )
    return result.run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "espalier-bench")
    arguments = parser.parse_args()
    model = make_llama(arguments.scratch / "llama-111m")
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{arguments.scratch}/mlflow.db"
    seconds, digests = {}, {}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as directory:
        for shards in arguments.shards:
            done = run(model, Path(directory) / str(shards), shards, arguments.samples, arguments.length)
            seconds[shards] = done["seconds"]["stream"] + done["seconds"]["work"]
            digests[shards] = [block["digest"] for block in done["blocks"]]
            print(
                f"  {shards} shards: stream {done['seconds']['stream']:6.1f} s  work {done['seconds']['work']:6.1f} s",
                flush=True,
            )
    first = arguments.shards[0]
    speedups = {shards: seconds[first] / spent for shards, spent in seconds.items()}
    same = len({tuple(value) for value in digests.values()}) == 1
    print(f"  speed-up over {first}: {speedups}; the same bytes: {same}")
    report("scaling", {"seconds": seconds, "speedup": speedups, "same_bytes": same})


if __name__ == "__main__":
    main()
