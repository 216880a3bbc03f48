"""GFLOP/s that fitting reaches, beside the plain bf16 products of the same shapes, on one thread and one block.

    python tests/benchmarks/reconstruction.py [--length 512] [--samples 16]

FLOPs are those of the matrix products that are done: with weights and in attention (its causal half), forward and
backward, and forward over the held-out samples. Norms, activations, masks and the optimiser are in the time alone.
"""

import argparse
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from bench_model import SMALL, make_llama, report

from espalier.stages.recipe import BlockTask, Recipe
from espalier.stages.shard.hidden_states import Pass
from espalier.stages.shard.shard import Shard
from espalier.stages.shard.spec import ShardSpec


def plain_gflops(shapes: Iterable[torch.Size], tokens: int, repeat: int = 5) -> float:
    """The rate of the three products of each weight, bf16, the best of a few runs in CPU time."""
    pairs = [
        (torch.randn(out, into).bfloat16(), torch.randn(tokens, into).bfloat16(), torch.randn(tokens, out).bfloat16())
        for out, into in shapes
    ]
    times = []
    for _ in range(repeat):
        started = time.process_time()
        for weight, inputs, gradient in pairs:
            torch.nn.functional.linear(inputs, weight)
            gradient @ weight
            gradient.t() @ inputs
        times.append(time.process_time() - started)
    return sum(6 * weight.numel() * tokens for weight, _, _ in pairs) / min(times) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--compute", choices=["fp32", "bf16"], help="default: bf16, which the model is stored in")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "espalier-bench")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = make_llama(arguments.scratch / "llama-111m")
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as output:
        shard = Shard(
            ShardSpec(
                index=0, first=0, last=1, embeds=True, heads=False, model=str(model), output=output,
                scratch=f"{output}/scratch", length=arguments.length,
                compute=arguments.compute, recipe=Recipe(reconstruct="component"),
            )
        )  # fmt: skip
        shard.open()
        shard.begin(Pass(microbatches=arguments.samples, keeps=0, onward=False))
        generator = torch.Generator().manual_seed(0)
        for sample in range(arguments.samples):
            shard.forward(
                sample, shard.embed(torch.randint(SMALL["vocab"], (1, arguments.length), generator=generator))
            )
        shapes = [w.shape for name, w in shard.skeleton.layers[0].named_parameters() if w.dim() == 2]
        before = plain_gflops(shapes, 2 * arguments.length)
        started, wall = time.process_time(), time.perf_counter()
        order = BlockTask(blocks=(0,))
        shard.work(order)
        (block,) = shard.committed(order)
        cpu, wall = time.process_time() - started, time.perf_counter() - wall
        after = plain_gflops(shapes, 2 * arguments.length)
    flops = sum(unit["flops"] for unit in block["units"])
    # On a busy machine a thread waits: what it computed in its own time is what can be compared.
    seconds = block["seconds"]["reconstruct"] * cpu / wall
    plain = (before + after) / 2
    rate = flops / seconds / 1e9
    print(f"  block      {rate:6.0f} GFLOP/s of CPU time, {block['gflops']:.0f} of wall time")
    print(f"  plain bf16 {plain:6.0f} GFLOP/s of CPU time: the block reaches {rate / plain:.2f} of it")
    report(
        "reconstruction",
        {"length": arguments.length, "gflops": rate, "plain_gflops": plain, "share": rate / plain},
    )


if __name__ == "__main__":
    main()
