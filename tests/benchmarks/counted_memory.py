"""What a shard's work takes on an accelerator, counted on tensors without memory, beside what is estimated.

    python tests/benchmarks/counted_memory.py [--sizes 8B 70B 405B] [--methods component block swaps ...]

Above the blocks that are worked on, in bf16, samples of 2048 tokens; fits of two samples a step.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from counted_work import SHAPES, count_work, llama, shapes_in

from espalier.stages.recipe import Recipe
from espalier.stages.shard.memory import fitting_bytes, masking_bytes, pass_bytes

METHODS = {
    "matrix": Recipe(reconstruct="matrix"),
    "component": Recipe(),
    "block": Recipe(reconstruct="block"),
    "window:2": Recipe(reconstruct="window", blocks_per_unit=2),
    "wanda": Recipe(reconstruct="none"),
    "dsnot": Recipe(reconstruct="none", refine="dsnot"),
    "swaps": Recipe(reconstruct="none", refine="swaps"),
    "solve": Recipe(reconstruct="none", solve=True),
    "corrected": Recipe(reconstruct="none", solve=True, targets="corrected"),
    "alps": Recipe(reconstruct="none", criterion="alps"),
    "sparsegpt": Recipe(reconstruct="none", criterion="sparsegpt"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    arguments = parser.parse_args()
    for size in arguments.sizes:
        config = llama(*SHAPES[size])
        for name in arguments.methods:
            recipe = METHODS[name]
            counted, (blocks, arithmetic) = count_work(config, recipe), shapes_in(config, recipe)
            if recipe.reconstruct != "none":
                pair = max(counted.fitting.values()), fitting_bytes(recipe, blocks, arithmetic)
            else:
                pair = counted.masking, masking_bytes(recipe, blocks, arithmetic)
            _line(size, name, *pair)
        _line(size, "pass", counted.passing, pass_bytes(blocks[0], config.hidden_size, arithmetic.length, arithmetic))


def _line(size: str, what: str, counted: int, estimated: int) -> None:
    ratio = estimated / counted
    print(
        f"{size:5} {what:10} counted {counted / 1e9:8.3f} GB  estimated {estimated / 1e9:8.3f}  {ratio:.2f}", flush=True
    )


if __name__ == "__main__":
    main()
