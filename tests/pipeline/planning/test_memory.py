"""Estimates of a shard's work beside peaks that were counted: at most 15 % above them, hardly ever below."""

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from counted_memory import Counted
from counted_work import SHAPES, count_work, llama, mixtral, shapes_in
from transformers import PreTrainedConfig

from espalier.pipeline.planning.memory import check_host, estimate_shard
from espalier.pipeline.planning.model_info import model_facts
from espalier.stages.errors import Refusal
from espalier.stages.loading.skeleton import read_config
from espalier.stages.metrics.perplexity import measure
from espalier.stages.recipe import Recipe
from espalier.stages.refine import REFINEMENTS
from espalier.stages.refine.sparse_swaps import swaps
from espalier.stages.shard.memory import fitting_bytes, logits_bytes, masking_bytes, pass_bytes
from espalier.stages.storage.hf_checkpoint import Checkpoint

BELOW, ABOVE = 0.96, 1.15
SMALL = (768, 2688, 12, 4)
MASKS = {
    "swaps": Recipe(reconstruct="none", refine="swaps"),
    "alps": Recipe(reconstruct="none", criterion="alps"),
    "solve": Recipe(reconstruct="none", solve=True),
    "sparsegpt": Recipe(reconstruct="none", criterion="sparsegpt"),
    "dsnot": Recipe(reconstruct="none", refine="dsnot"),
}
UNITS = {
    "matrix": Recipe(reconstruct="matrix"),
    "component": Recipe(),
    "block": Recipe(reconstruct="block"),
    "window": Recipe(reconstruct="window", blocks_per_unit=2),
}


@pytest.fixture(autouse=True)
def two_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rounds of swaps take the same memory."""
    short = replace(REFINEMENTS["swaps"], function=functools.partial(swaps, rounds=2))
    monkeypatch.setitem(REFINEMENTS, "swaps", short)


def assert_held(config: PreTrainedConfig, recipe: Recipe, *, device: str = "meta", length: int = 2048) -> None:
    """Raises AssertionError unless the estimates of a pass, of masks and of fits are near what is counted."""
    counted = count_work(config, recipe, device=device, length=length)
    blocks, arithmetic = shapes_in(config, recipe, device=device, length=length)
    estimated = {
        "pass": (pass_bytes(blocks[0], config.hidden_size, length, arithmetic), counted.passing),
        "masks": (masking_bytes(recipe, blocks, arithmetic), counted.masking),
    }
    if recipe.reconstruct != "none":
        del estimated["masks"]  # of scores alone here: small beside the fits
        estimated["fits"] = fitting_bytes(recipe, blocks, arithmetic), max(counted.fitting.values())
    apart = {what: estimate / peak for what, (estimate, peak) in estimated.items()}
    assert all(BELOW <= ratio <= ABOVE for ratio in apart.values()), (apart, estimated, counted.what)


@pytest.mark.parametrize(
    ("size", "unit"), [*(("8B", unit) for unit in UNITS), ("70B", "component"), ("405B", "component")]
)
def test_fits_on_an_accelerator(size: str, unit: str) -> None:
    assert_held(llama(*SHAPES[size]), UNITS[unit])


@pytest.mark.parametrize(
    ("size", "method"),
    [
        *(("8B", method) for method in ("swaps", "alps", "dsnot")),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("8B", "solve"), ("405B", "swaps"), ("405B", "alps"))),
    ],
)
def test_masks_on_an_accelerator(size: str, method: str) -> None:
    assert_held(llama(*SHAPES[size]), MASKS[method])


@pytest.mark.parametrize("method", ["swaps", "sparsegpt"])
def test_masks_on_a_cpu(method: str) -> None:
    assert_held(llama(*SMALL), MASKS[method], device="cpu", length=256)


@pytest.mark.parametrize("unit", ["component", "block"])
def test_fits_on_a_cpu(unit: str) -> None:
    assert_held(llama(*SMALL), UNITS[unit], device="cpu", length=256)


def test_fits_of_experts_on_a_cpu() -> None:
    assert_held(mixtral(512, 1024, 8, 4, experts=8, chosen=2), UNITS["component"], device="cpu", length=256)


@pytest.mark.parametrize("dense", [False, True])
def test_logits(dense: bool) -> None:
    with Counted() as counted, torch.no_grad():
        head, hidden = torch.randn(128256, 64, device="meta"), torch.randn(1, 512, 64, device="meta")
        tokens = torch.zeros(1, 512, dtype=torch.long, device="meta")

        def logits(states: torch.Tensor) -> torch.Tensor:
            return states @ head.T

        alone = counted.restart()
        measure(logits, hidden, tokens, (logits, hidden) if dense else None)
    assert 0.99 <= logits_bytes(128256) / (counted.peak - alone) <= (1.01 if dense else 1.35)


def test_views_are_no_memory_and_what_goes_is_not_counted() -> None:
    """Parameters that are copied, cast and seen as views: where another count saw storages of their own."""
    with Counted() as counted:
        weight = torch.nn.Parameter(torch.empty(64, 32, device="meta"))
        assert counted.live == 8192
        copied = copy.deepcopy(weight)
        assert counted.live == 2 * 8192
        copied.requires_grad_(False)
        copied.data = copied.data.to(torch.bfloat16)
        copied.requires_grad_(True)
        assert counted.live == 8192 + 4096
        made = copied.t() @ copied.data
        assert counted.live == 8192 + 4096 + 2048
        made.sum().backward()
        assert counted.live == 8192 + 2 * 4096 + 2048, "the gradient"
        del made, copied
        assert counted.live == 8192 and counted.peak >= 8192 + 2 * 4096 + 2048


def test_each_shard_is_charged_the_ends_that_it_loads(tiny_model: Callable[..., Path]) -> None:
    def ends(tied: bool) -> list[int]:
        model = tiny_model(tied=tied)
        facts = model_facts(read_config(model), str(model), checkpoint=Checkpoint(model))
        return [
            estimate_shard(
                facts, first, last, compute="fp32", resident="all", samples=0, length=8, microbatch=1, spool_memory=0,
                recipe=None, gpu=False,
            ).weights // 4 - sum(facts.block_parameters[first:last])
            for first, last in ((0, 1), (1, 2), (2, 4), (0, 4))
        ]  # fmt: skip

    table, norm = 128 * 32, 32
    assert ends(tied=False) == [table + norm, 0, table + norm, 2 * table + norm]
    assert ends(tied=True) == [table + norm, 0, table + norm, table + norm]


def test_what_a_gpu_takes_of_the_host_is_refused_with_the_figures(tiny_model: Callable[..., Path]) -> None:
    facts = model_facts(read_config(tiny_model()), "tiny")
    needs = [
        estimate_shard(
            facts, 0, 4, compute="fp32", resident="all", samples=8000, length=64, microbatch=1, spool_memory=spool,
            recipe=Recipe(), gpu=True,
        )
        for spool in (0, 1 << 28)
    ]  # fmt: skip
    assert needs[1].host - needs[0].host == 1 << 28 and needs[1].peak == needs[0].peak
    check_host(needs, needs[1].host)
    with pytest.raises(Refusal, match=r"a shard on a GPU would need \d\.\d GB and has 1\.0 GB"):
        check_host(needs, 10**9)
