"""What refinement costs and what it gains, one thread: CPU seconds beside Wanda's score and mask; errors of layers.

python tests/benchmarks/refinement.py [--model DIR] [--blocks 4]
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_model import report

from espalier.stages.criteria.scoring import score
from espalier.stages.masks import keep_mask
from espalier.stages.refine import dsnot, r2_dsnot, swaps
from espalier.stages.statistics import InputStatistics

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
from trained import BUNDLED, error, layers

CHUNK = 1 << 17  # weights scored and masked at a time, as a block's work does
PATTERNS = {"50 %": None, "2:4": (2, 4)}
TOKENS = 128 * 2048  # of one epoch of reconstruction


def seconds(run: Callable[[], object], repeat: int = 3) -> float:
    """CPU seconds of the quickest of `repeat` runs."""
    times = []
    for _ in range(repeat):
        started = time.process_time()
        run()
        times.append(time.process_time() - started)
    return min(times)


def wanda_mask(weight: torch.Tensor, statistics: InputStatistics, pattern: tuple[int, int] | None) -> torch.Tensor:
    keep = torch.empty(weight.shape, dtype=torch.bool)
    step = CHUNK // weight.shape[1]
    for rows in (slice(start, start + step) for start in range(0, len(weight), step)):
        keep[rows] = keep_mask(score("wanda", weight[rows], statistics), None if pattern else 0.5, pattern)
    return keep


def inputs(columns: int, hessian: bool) -> InputStatistics:
    """Inputs of several samples, correlated and off-centre."""
    statistics = InputStatistics(columns, hessian=hessian)
    mixing = torch.randn(columns // 8, columns) * (columns / 8) ** -0.5
    for _ in range(4):
        x = (
            torch.randn(512, columns // 8) @ mixing
            + torch.randn(512, columns) * 0.5
            + torch.linspace(-0.1, 0.1, columns)
        )
        statistics.update(x[None])
    return statistics


def cost_of_dsnot(rows: int, columns: int, dtype: torch.dtype) -> dict[str, Any]:
    weight, statistics = (torch.randn(rows, columns) * 0.02).to(dtype), inputs(columns, hessian=False)
    found = {}
    for name, pattern in PATTERNS.items():
        keep = wanda_mask(weight, statistics, pattern)
        wanda = seconds(lambda pattern=pattern: wanda_mask(weight, statistics, pattern))
        found[name] = {"wanda": wanda}
        for method in (dsnot, r2_dsnot):
            taken = seconds(lambda method=method, keep=keep, pattern=pattern: method(weight, keep, statistics, pattern))
            found[name] |= {method.__name__: taken, f"{method.__name__} / wanda": taken / wanda}
    return found


def cost_of_swaps(width: int, sliced: int, rounds: int) -> dict[str, Any]:
    """Seconds of a whole square layer, from `sliced` of its rows; and as a share of an epoch of its component."""
    weight, statistics = torch.randn(sliced, width) * 0.02, inputs(width, hessian=True)
    found = {}
    for name, pattern in PATTERNS.items():
        keep = wanda_mask(weight, statistics, pattern)
        scale = width / sliced
        wanda = scale * seconds(lambda pattern=pattern: wanda_mask(weight, statistics, pattern))
        taken = scale * seconds(lambda k=keep, p=pattern: swaps(weight, k, statistics, p, rounds=rounds), 1)
        found[name] = {"swaps": taken, "swaps / wanda": taken / wanda}
    x, w = torch.randn(2048, width).bfloat16(), torch.randn(width, width).bfloat16()
    epoch = TOKENS / 2048 * 3 * seconds(lambda: x @ w)  # forward and backward: 6 flops a weight and token
    return found | {"one epoch": epoch} | {f"swaps {n} / epoch": found[n]["swaps"] / epoch for n in PATTERNS}


def gains(model: Path, blocks: int) -> dict[str, dict[str, float]]:
    """Σ rᵀGr of each mask beside the dense output's Σ y², mean over the blocks' linears."""
    methods = {"bare": lambda w, keep, *_: keep, "dsnot": dsnot, "r2_dsnot": r2_dsnot, "swaps": swaps}
    found: dict[str, dict[str, float]] = {}
    for start in ("magnitude", "wanda"):
        for name, pattern in {"50 %": None, "60 %": None, **PATTERNS}.items():
            sums = dict.fromkeys(methods, 0.0)
            linears = [linear for block in range(blocks) for linear in layers(model, block).values()]
            for weight, statistics in linears:
                ratio = None if pattern else float(name.split()[0]) / 100
                keep = keep_mask(score(start, weight, statistics), ratio, pattern)
                dense = error(weight, torch.zeros_like(keep), statistics).sum()
                for method, refine in methods.items():
                    left = error(weight, refine(weight, keep, statistics, pattern), statistics).sum()
                    sums[method] += float(left / dense) / len(linears)
            found[f"{start} {name}"] = sums
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=BUNDLED, help="a checkpoint of at least --blocks blocks")
    parser.add_argument("--blocks", type=int, default=4)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result: dict[str, Any] = {}
    with torch.no_grad():
        for shape in ((4096, 11008), (8192, 8192)):
            for dtype in (torch.float32, torch.bfloat16):
                result[f"{shape[0]} x {shape[1]}, {dtype}"] = cost_of_dsnot(*shape, dtype)
        result["swaps, 4096 wide, 10 rounds"] = cost_of_swaps(4096, 512, 10)
        result["swaps, 8192 wide, 10 rounds"] = cost_of_swaps(8192, 128, 10)
        result["swaps, 4096 wide, 25 rounds"] = cost_of_swaps(4096, 512, 25)
        result["errors"] = gains(chosen.model, chosen.blocks)
    for name, values in result.items():
        print(name)
        for key, value in values.items():
            shown = {k: round(v, 4) for k, v in value.items()} if isinstance(value, dict) else round(value, 4)
            print(f"  {key:14} {shown}")
    report("refinement", {"model": chosen.model.name, **result})


if __name__ == "__main__":
    main()
