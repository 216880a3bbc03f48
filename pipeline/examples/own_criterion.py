"""A criterion of one's own: a function of a weight and of the statistics of its inputs.

python pipeline/examples/own_criterion.py MODEL CALIBRATION OUTPUT
"""

import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from espalier import PruneConfig, prune
from espalier.stages.statistics import InputStatistics


def spread_wanda(weight: Tensor, statistics: InputStatistics, alpha: float = 0.5) -> Tensor:
    """|W_ij| · std(X_j)^α: a channel that never varies says nothing."""
    return weight.float().abs() * statistics.variance.sqrt().pow(alpha).to(weight.device)


def main(model: str, calibration: str, output: str, **options: Any) -> Path:
    """Where the pruned model is. Shards import this file by its name: it must lie in the current folder or on
    PYTHONPATH."""
    criterion = f"{Path(__file__).stem}.spread_wanda"
    config = PruneConfig(
        model=model,
        output=output,
        calibration=calibration,
        criterion=criterion,
        criterion_options={"alpha": 0.7},
        reconstruct="none",
        **options,
    )
    return prune(config).output


if __name__ == "__main__":
    sys.stdout.write(f"{main(*sys.argv[1:4])}\n")
