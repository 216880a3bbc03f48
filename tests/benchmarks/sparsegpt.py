"""SparseGPT on one Llama block, one thread: seconds of CPU time for its statistics, its factors and its solves.

    python tests/benchmarks/sparsegpt.py [--pattern 2:4] [--samples 32] [--length 512] [--hidden 1024 --mlp 2816]

Weights and inputs are random bfloat16. Statistics with the Hessian stand beside those without, over the same samples.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from bench_model import report
from torch import Tensor

from espalier.stages.sparsegpt import inverse_factor, sparsegpt
from espalier.stages.statistics import InputStatistics


def shapes(hidden: int, mlp: int) -> dict[str, tuple[int, list[int]]]:
    """Input -> (its channels, the output channels of each linear that reads it)."""
    return {
        "q k v": (hidden, [hidden, hidden // 2, hidden // 2]),
        "o": (hidden, [hidden]),
        "gate up": (hidden, [mlp, mlp]),
        "down": (mlp, [hidden]),
    }


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = run()
    return time.process_time() - started, result


def gather(x_STI: Tensor, samples: int, hessian: bool) -> InputStatistics:
    """Statistics of `samples` samples, one an update; the few there are come round again."""
    statistics = InputStatistics(x_STI.shape[-1], hessian=hessian)
    for sample in range(samples):
        statistics.update(x_STI[sample % len(x_STI)][None])
    return statistics


def measure(name: str, channels: int, outputs: list[int], arguments: argparse.Namespace) -> dict[str, float]:
    x = torch.randn(4, arguments.length, channels).bfloat16()
    target = {"pattern": tuple(map(int, arguments.pattern.split(":")))} if arguments.pattern else {"sparsity": 0.5}
    best: dict[str, float] = {}
    for _ in range(arguments.repeat):
        seconds = {"plain sums": timed(lambda: gather(x, arguments.samples, hessian=False))[0]}
        seconds["sums + gram"], statistics = timed(lambda: gather(x, arguments.samples, hessian=True))
        hessian = statistics.hessian
        seconds["factor"], factor = timed(lambda hessian=hessian: inverse_factor(hessian))
        seconds["solve"] = 0.0
        for rows in outputs:
            weight = torch.randn(rows, channels).bfloat16()
            solve = lambda w=weight, h=hessian, f=factor: sparsegpt(w, h, **target, factor=f)  # noqa: E731
            seconds["solve"] += timed(solve)[0]
        best = {part: min(value, best.get(part, value)) for part, value in seconds.items()}
    print(f"  {name:8}" + "".join(f"  {part} {value:6.3f} s" for part, value in best.items()), flush=True)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pattern", help="such as 2:4; default: 50 %% of each 128 columns")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--mlp", type=int, default=2816)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    inputs = shapes(arguments.hidden, arguments.mlp)
    parts = {name: measure(name, *shape, arguments) for name, shape in inputs.items()}
    total = {part: sum(seconds[part] for seconds in parts.values()) for part in next(iter(parts.values()))}
    print("  block   " + "".join(f"  {part} {value:6.3f} s" for part, value in total.items()))
    report("sparsegpt", {**vars(arguments), "seconds": total, "inputs": parts})


if __name__ == "__main__":
    main()
