"""Two recipes on one model, side by side.

python pipeline/examples/prune_and_compare.py MODEL CALIBRATION HELD_OUT OUTPUT
"""

import sys
from pathlib import Path
from typing import Any

from espalier import PruneConfig, Refusal, compare, prune


def main(model: str, calibration: str, held_out: str, output: str, **options: Any) -> list[dict[str, Any]]:
    """A row for each recipe, the best first."""
    for criterion in ("magnitude", "wanda"):
        prune(
            PruneConfig(
                model=model,
                output=str(Path(output) / criterion),
                calibration=calibration,
                eval=held_out,
                criterion=criterion,
                experiment="example",
                run_name=criterion,
                **options,
            )
        )
    return compare(["example"]).rows


if __name__ == "__main__":
    try:
        for row in main(*sys.argv[1:5]):
            sys.stdout.write(f"{row['run']}: perplexity {row['perplexity']:.2f}, sparsity {row['sparsity']:.2%}\n")
    except Refusal as refusal:
        sys.exit(str(refusal))
