"""No bit depends on where in memory an operand lies: sums, statistics, blocks, fits, SparseGPT, ALPS, swaps.

MKL adds up the rows of small products in an order that it chooses by alignment, unless it is told not to
(cluster/arithmetic.py, called by conftest.py as by every worker). Each thing here is computed from copies of its
operands that start at each of 16 places of a cache line, on one thread and on two.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from streaming import bits, make_shards, prune
from torch import Tensor, nn

from espalier.stages.alps import alps, solve
from espalier.stages.masks import keep_mask
from espalier.stages.model.calls import LayerCalls
from espalier.stages.precision import computing
from espalier.stages.recipe import Recipe
from espalier.stages.refine import swaps
from espalier.stages.sparsegpt import sparsegpt
from espalier.stages.statistics import InputStatistics

pytestmark = pytest.mark.slow
PLACES = 16  # float32 numbers in a cache line
LINE = 64  # bytes
THREADS = (1, 2)


def placed(x: Tensor, place: int) -> Tensor:
    """A copy that starts `place` elements behind the start of a cache line."""
    space = torch.empty(x.numel() + 2 * PLACES, dtype=x.dtype)
    start = -space.data_ptr() % LINE // x.element_size() + place
    copy = space[start : start + x.numel()].view(x.shape)
    assert (copy.data_ptr() - place * x.element_size()) % LINE == 0
    return copy.copy_(x)


def outcomes(compute: Callable[..., Tensor], *operands: Tensor, places: int = PLACES) -> set[bytes]:
    """All that `compute` gives, operands at several places together and apart."""
    return {
        bits(compute(*(placed(x, (place * (number + 1)) % PLACES) for number, x in enumerate(operands))))
        for place in range(places)
    }


@pytest.fixture(params=THREADS, ids=lambda threads: f"{threads} threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3 + 0.5


def sums(statistics: InputStatistics) -> Tensor:
    parts = [statistics.sum, statistics.sum_sq, statistics.weighted_variance]
    parts += [] if statistics.gram is None else [statistics.gram.double().flatten()]
    parts += [] if statistics.output_sum_sq is None else [statistics.output_sum_sq]
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("channels", [1, 6, 17, 64, 100, 256, 1000])
@pytest.mark.parametrize("tokens", [1, 8, 31, 100, 256])
def test_sums_over_inputs_and_outputs(tokens: int, channels: int, dtype: torch.dtype, threads: int) -> None:
    def compute(x: Tensor, y: Tensor) -> Tensor:
        statistics = InputStatistics(channels, hessian=channels <= 100, out_features=7)
        statistics.update(x, y)
        return sums(statistics)

    x, y = random(3, tokens, channels).to(dtype), random(3, tokens, 7).to(dtype)
    assert len(outcomes(compute, x, y)) == 1

    def apart(x: Tensor, y: Tensor) -> Tensor:  # each sample an update of its own
        statistics = InputStatistics(channels, hessian=channels <= 100, out_features=7)
        for x_1TI, y_1TO in zip(x.split(1), y.split(1), strict=True):
            statistics.update(x_1TI, y_1TO)
        return sums(statistics)

    assert outcomes(apart, x, y, places=3) == outcomes(compute, x, y, places=1)


def test_sums_are_those_of_any_number_of_threads() -> None:
    found = set()
    for threads in THREADS:
        torch.set_num_threads(threads)
        for tokens, channels in ((8, 6), (256, 100), (2048, 64), (300, 1000)):
            statistics = InputStatistics(channels, out_features=5)
            statistics.update(random(2, tokens, channels), random(2, tokens, 5))
            found.add((tokens, channels, bits(sums(statistics))))
    torch.set_num_threads(1)
    assert len(found) == 4


def test_a_block_wherever_its_weights_and_inputs_lie(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, threads: int
) -> None:
    for hidden in (32, 48):
        (shard,) = make_shards(tiny_checkpoint(hidden=hidden), tmp_path / str(hidden), 1, 12)
        block = shard.blocks.hold([1])[0][1]
        compute = partial(through_a_moved_block, LayerCalls(shard.skeleton.calls), block)
        for samples, tokens in ((1, 1), (1, 12), (2, 12)):  # one row is what MKL is most particular about
            assert len(outcomes(compute, random(samples, tokens, hidden))) == 1


def through_a_moved_block(calls: LayerCalls, block: nn.Module, x: Tensor) -> Tensor:
    for parameter in block.parameters():
        parameter.data = placed(parameter.data, x.data_ptr() % LINE // 4)
    with torch.no_grad(), computing(block):
        return calls.following(1, len(x), x.shape[1]).run(block, x)


def correlated(tokens: int, inputs: int) -> Tensor:
    x = random(tokens, inputs, seed=4)
    return x + x @ random(inputs, inputs, seed=5) / inputs


@pytest.mark.parametrize("shape", [(24, 52), (40, 64)], ids=str)
def test_masks_and_values(shape: tuple[int, int], threads: int) -> None:
    x = correlated(150, shape[1])
    weight, gram = random(*shape, seed=3), x.T @ x
    statistics = InputStatistics(shape[1], hessian=True)
    statistics.update(x[None])
    keep = keep_mask(weight.abs(), 0.5)
    for solver in (
        lambda w, g: sparsegpt(w, g, sparsity=0.5)[0],
        lambda w, g: sparsegpt(w, g, pattern=(2, 4))[0],
        lambda w, g: alps(w, g, sparsity=0.5)[0],
        lambda w, g: solve(w, keep, g),
    ):
        assert len(outcomes(solver, weight, gram)) == 1
    assert len(outcomes(lambda w: swaps(w, keep, statistics), weight)) == 1


def test_fits_of_activations_in_memory_or_on_disk(
    tiny_checkpoint: Callable[..., Path], tiny_tokens: Callable[..., Tensor], tmp_path: Path
) -> None:
    made = set()
    for memory in (0, 5000, 1 << 30):
        home = tmp_path / str(memory)
        recipe = Recipe(learning_rate=0.04, refine="swaps", solve=True)
        (shard,) = make_shards(tiny_checkpoint(hidden=48), home, 1, 12, recipe=recipe, spool_memory=memory)
        reports = prune([shard], tiny_tokens(9, 12))
        errors = [(unit["error_before"], unit["error_after"]) for report in reports for unit in report["units"]]
        written = b"".join(path.read_bytes() for path in sorted((home / "output").glob("*.safetensors")))
        made.add((str(errors), written))
    assert len(made) == 1


PLAIN = """
import torch
from espalier.cluster.arithmetic import steady_products
{call}
torch.set_num_threads(1)
x, found = torch.randn(31, 100, generator=torch.Generator().manual_seed(0)), set()
for place in range(16):
    space = torch.empty(x.numel() + 32)
    start = -space.data_ptr() % 64 // 4 + place
    copy = space[start : start + x.numel()].view(x.shape).copy_(x)
    found |= {{(torch.nn.functional.linear(copy[:1], copy)).numpy().tobytes()}}
print(len(found))
"""


def test_it_is_the_library_that_was_asked_and_in_time() -> None:
    """A fresh process that asked, before its first product, gives one result; one that did not may give several."""
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    program = PLAIN.format(call="steady_products()")
    asked = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert asked.stdout.strip() == "1"


LESSER = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2,STRICT"}
AGAIN = (
    "shard/test_alignment.py",
    "shard/test_exactness.py",
    "reconstruction/test_fit.py",
    "test_statistics.py",
    "test_sparsegpt.py",
)


@pytest.mark.slow
@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="this is the imitation")
def test_once_more_as_on_a_processor_without_avx512() -> None:
    """torch, oneDNN and MKL told to use AVX2 at most, as far as they can be told: what they then compute with is what
    they compute with there. (Not imitated: the sizes of its caches, by which MKL cuts large products.)"""
    here = Path(__file__).parents[1]
    files = [str(here / file) for file in AGAIN]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    environment = os.environ | LESSER | {"PYTHONPATH": os.pathsep.join(sys.path)}
    root = here.parents[1]
    again = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-1000:]
    assert " passed" in again.stdout or "[100%]" in again.stdout
