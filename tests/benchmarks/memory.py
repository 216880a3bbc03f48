"""Peak memory of the driver and the shards on an 8 GB checkpoint, one block in memory at a time.

    python tests/benchmarks/memory.py [--shards 1] [--samples 8] [--length 256] [--spool-memory 256MB]

A shard's bound is its resident weights and the block that is read meanwhile, the larger of one unit's training
state and the spool's budget, and 1 GB.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import bench_model
from bench_model import LARGE, report, token_ids

from espalier import PruneConfig, prune

TRAINING_BYTES = 15  # a parameter of the unit being fitted: bf16 weight, float32 master, two moments, its keep mask


def bounds(shape: dict[str, int], shards: int, spool: int) -> list[int]:
    """Bytes that each shard may take at most."""
    width = shape["hidden"]
    attention = 2 * width * width + 2 * width * (width // shape["heads"]) * shape["kv_heads"]
    mlp = 3 * width * shape["mlp"]
    gradient = 2 * width * shape["mlp"]
    end = shape["vocab"] * width
    working = max(TRAINING_BYTES * max(attention, mlp) + gradient, spool)
    result = []
    for index in range(shards):
        resident = 2 * (attention + mlp) + (end if index == 0 else 0) + (end if index == shards - 1 else 0)
        result.append(2 * resident + working + 10**9)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--spool-memory", default="256MB")
    parser.add_argument("--blocks", type=int, default=LARGE["blocks"])
    parser.add_argument("--reconstruct", default="component")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "espalier-bench")
    arguments = parser.parse_args()
    shape = LARGE | {"blocks": arguments.blocks}
    model = arguments.scratch / f"llama-4096-{arguments.blocks}"
    # In a process of its own: this one's peak is what is measured.
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in shape.items()]
    subprocess.run([sys.executable, bench_model.__file__, str(model), *flags], check=True, stdout=subprocess.DEVNULL)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{arguments.scratch}/mlflow.db"
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as directory:
        config = PruneConfig(
            model=str(model),
            output=f"{directory}/pruned",
            calibration=token_ids(arguments.samples, arguments.length, shape["vocab"]),
            samples=arguments.samples,
            length=arguments.length,
            shards=arguments.shards,
            threads=1,
            resident="one",
            reconstruct=arguments.reconstruct,
            spool_memory=arguments.spool_memory,
        )
        run = prune(config).run
    allowed = bounds(shape, arguments.shards, int(config.spool_memory))
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    print(f"  checkpoint {size / 1e9:6.2f} GB; {run['seconds']['total']:.0f} s")
    print(f"  driver     {run['peak_memory']['driver'] / 1e9:6.2f} GB (bound 1.20)")
    for index, (peak, bound) in enumerate(zip(run["peak_memory"]["shards"], allowed, strict=True)):
        print(f"  shard {index}    {peak / 1e9:6.2f} GB (bound {bound / 1e9:.2f})")
    seconds = {name: spent(run["timeline"], name) for name in ("read", "load")}
    print(f"  blocks read ahead in {seconds['read']:.0f} s, waited for {seconds['load']:.0f} s")
    report("memory", {"seconds": seconds, "checkpoint": size, "peak_memory": run["peak_memory"], "bounds": allowed})


def spent(timeline: list[dict[str, Any]], name: str) -> float:
    """Seconds of the phases of that name that were about one block."""
    about = [phase for phase in timeline if phase["phase"] == name and phase["block"] is not None]
    return sum(phase["end"] - phase["start"] for phase in about)


if __name__ == "__main__":
    main()
