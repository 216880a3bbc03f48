"""What ALPS costs beside SparseGPT, both from a Gram matrix, one thread; and layers' errors beside SparseGPT's.

python tests/benchmarks/alps.py [--shapes 1024x2816 2816x1024] [--estimate 8192x28672]
python tests/benchmarks/alps.py --model DIR --text FILE [--samples 64 --length 256]
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from bench_model import report
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import espalier.stages.alps
from espalier.stages.alps import PANEL, STEPS, alps
from espalier.stages.sparsegpt import inverse_factor, sparsegpt
from espalier.stages.statistics import InputStatistics

TARGETS: dict[str, dict[str, Any]] = {
    "50 %": {"sparsity": 0.5},
    "60 %": {"sparsity": 0.6},
    "70 %": {"sparsity": 0.7},
    "2:4": {"pattern": (2, 4)},
    "4:8": {"pattern": (4, 8)},
}
PRODUCTS = ("mm", "addmm")  # operations
LAST = 3  # products of conjugate gradients, in the estimate: a gradient and two steps
PASSES = 25  # over matrices (O, I) in a step of ADMM, in the estimate, its mask left out
RATES = {"A100 (19.5 TFLOP/s float32, 2.0 TB/s)": (19.5e12, 2.0e12), "H100 (67, 3.35)": (67e12, 3.35e12)}


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = run()
    return time.process_time() - started, result


class Products(TorchDispatchMode):
    """CPU seconds of matrix products, and how many there were, while `counts`."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds, self.number, self.counts = 0.0, 0, True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seconds, result = timed(lambda: func(*args, **(kwargs or {})))
        if self.counts and func.overloadpacket.__name__ in PRODUCTS:
            self.seconds += seconds
            self.number += 1
        return result


def shares(weight: Tensor, gram: Tensor, target: dict[str, Any]) -> dict[str, float]:
    """Where the seconds of one run of ALPS go, and its number of products."""
    products, others = Products(), Counter[str]()

    def counted(part: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **options: Any) -> Tensor:
            products.counts = False
            seconds, result = timed(lambda: function(*args, **options))
            products.counts = True
            others[part] += seconds  # type: ignore[assignment]
            return result  # type: ignore[no-any-return]

        return run

    module = espalier.stages.alps
    with (
        patch.object(module, "keep_mask", counted("mask", module.keep_mask)),
        patch.object(module, "_inverse", counted("factor", module._inverse)),
        products,
    ):
        whole, _ = timed(lambda: alps(weight, gram, **target))
    found = {"factor": others["factor"] / whole, "products": products.seconds / whole, "mask": others["mask"] / whole}
    return found | {"rest": 1 - sum(found.values()), "number of products": products.number}


def cost(rows: int, columns: int, repeat: int) -> dict[str, dict[str, float]]:
    """The quickest of `repeat` runs of each, in turn, over one Gram matrix of correlated inputs."""
    mixing = torch.randn(columns, columns) / columns**0.5
    gram = torch.zeros(columns, columns)
    for _ in range(8):
        x_TI = torch.randn(512, columns)
        x_TI += x_TI @ mixing
        gram.addmm_(x_TI.T, x_TI)
    weight = torch.randn(rows, columns)
    shares(weight[:8, :8], gram[:8, :8], TARGETS["50 %"])  # a first one takes a second for what it loads
    found = {}
    for name in ("50 %", "2:4"):
        target, best = TARGETS[name], {"sparsegpt": float("inf"), "alps": float("inf")}
        for _ in range(repeat):
            peer, _ = timed(lambda t=target: sparsegpt(weight, gram, **t, factor=inverse_factor(gram)))
            taken, _ = timed(lambda t=target: alps(weight, gram, **t))
            best = {"sparsegpt": min(best["sparsegpt"], peer), "alps": min(best["alps"], taken)}
        ratio = best["alps"] / best["sparsegpt"]
        found[name] = best | {"ratio": ratio} | shares(weight, gram, target)
        print(f"  {rows} x {columns}, {name:5}" + "".join(f"  {key} {value:.3f}" for key, value in found[name].items()))
    return found


def memory(columns: int) -> float:
    """Most memory that ALPS takes for a layer of 64 rows, the Gram matrix included, in Gram matrices (Linux)."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])

    torch.linalg.cholesky(torch.eye(8))  # loads LAPACK
    gram = torch.eye(columns).mul_(2)
    before = status("VmRSS")
    alps(torch.randn(64, columns), gram, sparsity=0.5)
    return 1 + (status("VmHWM") - before) / gram.nbytes


def estimate(rows: int, columns: int) -> dict[str, Any]:
    """Float32 operations and bytes of one layer, and the seconds that they are at a device's full rates."""
    flops = {"factor": columns**3, "products": (STEPS + LAST) * 2 * rows * columns**2}
    traffic = 4 * (STEPS * PASSES * rows * columns + columns**3 // PANEL)  # each panel reads half of H and writes it
    found: dict[str, Any] = {"TFLOP": {part: count / 1e12 for part, count in flops.items()}, "GB moved": traffic / 1e9}
    for device, (rate, bandwidth) in RATES.items():
        found[device] = sum(flops.values()) / rate + traffic / bandwidth
    print(f"  {rows} x {columns}: " + "; ".join(f"{key} {value}" for key, value in found.items()))
    return found


def layers(model: Path, text: Path, samples: int, length: int) -> dict[str, tuple[Tensor, InputStatistics]]:
    """Every linear of the model's blocks -> its weight and its inputs' statistics over windows spread over the text."""
    tokens = torch.tensor(AutoTokenizer.from_pretrained(model)(text.read_text())["input_ids"])
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found: dict[str, tuple[Tensor, InputStatistics]] = {}
    for name, module in network.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = (module.weight.detach(), InputStatistics(module.in_features, hessian=True))
            module.register_forward_pre_hook(lambda _, args, seen=found[name][1]: seen.update(args[0]))
    starts = torch.linspace(0, len(tokens) - length, samples).long()
    for some in starts.split(8):
        network(torch.stack([tokens[start : start + length] for start in some]))
    return found


def errors(model: Path, text: Path, samples: int, length: int) -> dict[str, dict[str, float]]:
    """‖X (W̃ − W)ᵀ‖² of ALPS as a share of SparseGPT's, layer by layer."""
    table: dict[str, dict[str, float]] = {}
    sums = {target: [0.0, 0.0] for target in TARGETS}
    for name, (weight, statistics) in layers(model, text, samples, length).items():
        gram = statistics.gram
        assert gram is not None
        table[name] = {}
        for target, chosen in TARGETS.items():
            if weight.shape[1] % chosen.get("pattern", (1, 1))[1]:
                continue
            found = []
            for method in (alps, sparsegpt):
                off_OI = (method(weight, gram, **chosen)[0] - weight).double()
                found.append(float(((off_OI @ gram.double()) * off_OI).sum()))
            table[name][target] = found[0] / found[1]
            sums[target] = [total + one for total, one in zip(sums[target], found, strict=True)]
        print(f"  {name:24}" + "".join(f"  {target} {ratio:.3f}" for target, ratio in table[name].items()), flush=True)
    summary = {}
    for target in TARGETS:
        ratios = [row[target] for row in table.values() if target in row]
        whole = sums[target][0] / sums[target][1]
        summary[target] = {
            "layers": len(ratios),
            "min": min(ratios),
            "median": median(ratios),
            "max": max(ratios),
            "of the sums": whole,
        }
        print(f"  {target:5}" + "".join(f"  {key} {value:.3g}" for key, value in summary[target].items()))
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = lambda text: tuple(map(int, text.split("x")))  # noqa: E731
    parser.add_argument("--shapes", type=shape, nargs="*", default=[(1024, 2816), (2816, 1024)], help="rows x inputs")
    parser.add_argument("--estimate", type=shape, nargs="*", default=[(8192, 28672), (28672, 8192)])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--model", type=Path, help="a checkpoint: its layers' errors instead of seconds")
    parser.add_argument("--text", type=Path, help="what its layers read")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result: dict[str, Any] = {}
    with torch.no_grad():
        if arguments.model:
            result["errors"] = errors(arguments.model, arguments.text, arguments.samples, arguments.length)
        else:
            if sys.platform == "linux":
                result["memory in Gram matrices"] = memory(4096)
                print(f"  memory, 64 x 4096: {result['memory in Gram matrices']:.2f} Gram matrices")
            result["estimate"] = {
                f"{rows} x {columns}": estimate(rows, columns) for rows, columns in arguments.estimate
            }
            result["cost"] = {
                f"{rows} x {columns}": cost(rows, columns, arguments.repeat) for rows, columns in arguments.shapes
            }
    report("alps", result)


if __name__ == "__main__":
    main()
