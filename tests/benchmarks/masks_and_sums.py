"""Masks and statistics alone, one thread: CPU milliseconds, the best of a few.

python tests/benchmarks/masks_and_sums.py
"""

import time
from collections.abc import Callable

import torch
from bench_model import report

from espalier.stages.masks import count_zeros, keep_mask, masked
from espalier.stages.statistics import InputStatistics

ROWS, COLUMNS = 4096, 11008


def best(run: Callable[[], object], repeat: int = 5) -> float:
    """Milliseconds of CPU time of the quickest of `repeat` runs."""
    times = []
    for _ in range(repeat):
        started = time.process_time()
        run()
        times.append(time.process_time() - started)
    return 1e3 * min(times)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    scores = torch.rand(ROWS, COLUMNS)
    weight = torch.randn(ROWS, COLUMNS).bfloat16()
    keep = keep_mask(scores, 0.5)
    inputs = torch.randn(4, 512, 4096).bfloat16()
    statistics = InputStatistics(4096)
    result = {
        "keep_mask, 50 % per row": best(lambda: keep_mask(scores, 0.5)),
        "keep_mask, 50 % of the matrix": best(lambda: keep_mask(scores, 0.5, scope="matrix")),
        "keep_mask, 2:4": best(lambda: keep_mask(scores, pattern=(2, 4))),
        "keep_mask, 4:8": best(lambda: keep_mask(scores, pattern=(4, 8))),
        "torch.topk of half of each row": best(lambda: torch.topk(scores, COLUMNS // 2, sorted=False), 1),
        "masked, bf16": best(lambda: masked(weight, keep)),
        "count_zeros, bf16": best(lambda: count_zeros(weight)),
        "InputStatistics.update, 2048 tokens x 4096, bf16": best(lambda: statistics.update(inputs)),
    }
    for name, milliseconds in result.items():
        print(f"  {name:50} {milliseconds:8.1f} ms")
    report("masks_and_sums", {"shape": [ROWS, COLUMNS], "milliseconds": result})


if __name__ == "__main__":
    main()
