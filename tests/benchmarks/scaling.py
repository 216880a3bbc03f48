"""Two shards against one, one thread each, with reconstruction: seconds of stream and work.

    python tests/benchmarks/scaling.py [--samples 32] [--length 512] [--shards 2] [--repeat 3]

Also checks that both gave the same bytes, and measures the ceiling in the same minute: how much more bf16 product two
processes of one thread do than one. On a shared machine the ceiling itself moves.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_model import SMALL, make_llama, report, token_ids

from espalier import PruneConfig, prune


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


def _multiply(seconds: float, ready: Any, rates: Any) -> None:
    torch.set_num_threads(1)
    inputs, weight = torch.randn(1024, 1024).bfloat16(), torch.randn(2816, 1024).bfloat16()
    torch.nn.functional.linear(inputs, weight)
    ready.wait()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        torch.nn.functional.linear(inputs, weight)
        count += 1
    rates.put(count / (time.perf_counter() - started))


def product_rate(processes: int, seconds: float = 4.0) -> float:
    """bf16 products a second that so many processes of one thread do together."""
    context = multiprocessing.get_context("spawn")
    ready, rates = context.Barrier(processes), context.Queue()
    workers = [context.Process(target=_multiply, args=(seconds, ready, rates)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    total = sum(rates.get() for _ in workers)
    for worker in workers:
        worker.join()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "espalier-bench")
    arguments = parser.parse_args()
    model = make_llama(arguments.scratch / "llama-111m")
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{arguments.scratch}/mlflow.db"
    speedups, ceilings, digests = [], [], set()
    for _ in range(arguments.repeat):
        seconds = {}
        for shards in (1, arguments.shards):
            with tempfile.TemporaryDirectory(dir=arguments.scratch) as directory:
                done = run(model, Path(directory) / "pruned", shards, arguments.samples, arguments.length)
            seconds[shards] = done["seconds"]["stream"] + done["seconds"]["work"]
            digests.add(tuple(block["digest"] for block in done["blocks"]))
            print(
                f"  {shards} shards: stream {done['seconds']['stream']:6.1f} s  work {done['seconds']['work']:6.1f} s",
                flush=True,
            )
        speedups.append(seconds[1] / seconds[arguments.shards])
        ceilings.append(product_rate(arguments.shards) / product_rate(1))
        print(f"  speed-up {speedups[-1]:.2f}; plain bf16 products {ceilings[-1]:.2f}", flush=True)
    same = len(digests) == 1
    print(f"  median speed-up {statistics.median(speedups):.2f}; the same bytes: {same}")
    report("scaling", {"speedup": speedups, "plain_products": ceilings, "same_bytes": same})


if __name__ == "__main__":
    main()
