"""The plan: which blocks go where, what they are expected to need, and what is refused with figures."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import family_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from espalier.pipeline.cli.main import main
from espalier.pipeline.config.prune import PruneConfig
from espalier.pipeline.planning.memory import (
    CONTEXT_BYTES,
    ShardEstimate,
    choose_resident,
    estimate_shard,
    split_blocks,
)
from espalier.pipeline.planning.model_info import ModelInfo, check_headers, model_facts
from espalier.pipeline.planning.resolve import resolve_auto
from espalier.stages.devices import has_units
from espalier.stages.errors import Refusal
from espalier.stages.loading.skeleton import read_config
from espalier.stages.precision import Compute
from espalier.stages.recipe import Recipe
from espalier.stages.refine import REFINEMENTS, Refinement
from espalier.stages.storage.hf_checkpoint import Checkpoint

costs_and_shards = st.lists(st.integers(1, 1000), min_size=1, max_size=40).flatmap(
    lambda costs: st.tuples(st.just(tuple(costs)), st.integers(1, len(costs)))
)


@given(costs_and_shards)
def test_shards_are_consecutive_and_each_has_a_block(given: tuple[tuple[int, ...], int]) -> None:
    costs, shards = given
    ranges = split_blocks(costs, shards)
    assert len(ranges) == shards
    assert ranges[0][0] == 0 and ranges[-1][1] == len(costs)
    assert all(first < last for first, last in ranges)
    assert all(before[1] == after[0] for before, after in pairwise(ranges))


@given(st.integers(1, 80), st.integers(1, 80))
def test_equal_blocks_are_spread_evenly(blocks: int, shards: int) -> None:
    if shards > blocks:
        with pytest.raises(Refusal, match=f"at most {blocks}"):
            split_blocks((7,) * blocks, shards)
        return
    sizes = [last - first for first, last in split_blocks((7,) * blocks, shards)]
    assert max(sizes) - min(sizes) <= 1


@given(costs_and_shards)
def test_no_shard_gets_more_than_its_share_and_one_block(given: tuple[tuple[int, ...], int]) -> None:
    costs, shards = given
    for first, last in split_blocks(costs, shards):
        assert sum(costs[first:last]) <= sum(costs) / shards + 2 * max(costs)


@pytest.fixture(scope="module")
def facts(tiny_model: Callable[..., Path]) -> ModelInfo:
    return model_facts(read_config(tiny_model()), str(tiny_model()))


def estimated(facts: ModelInfo, first: int = 0, last: int = 4, **changes: object) -> ShardEstimate:
    usual = {
        "compute": "fp32",
        "resident": "all",
        "samples": 20,
        "length": 50,
        "microbatch": 1,
        "spool_memory": 1 << 30,
        "recipe": Recipe(),
    }
    return estimate_shard(facts, first, last, **(usual | {"gpu": False} | changes))  # type: ignore[arg-type]


def peak(facts: ModelInfo, first: int = 0, last: int = 4, **changes: object) -> int:
    return estimated(facts, first, last, **changes).peak


def test_facts_are_those_of_the_checkpoint(facts: ModelInfo, tiny_model: Callable[..., Path]) -> None:
    weights = load_file(tiny_model() / "model.safetensors")
    assert facts.parameters == sum(tensor.numel() for tensor in weights.values())
    assert facts.total_bytes == sum(tensor.nbytes for tensor in weights.values())
    assert {(name, *weights[name].shape) for name, _, _ in facts.linears} == set(facts.linears)
    assert len(facts.linears) == 4 * 7


def test_what_travels_beside_hidden_states_is_counted(tmp_path: Path, facts: ModelInfo) -> None:
    """Gemma 3n's blocks hand on three streams of 32, two keys and values of 32, and 8 for each block to come."""
    more = model_facts(read_config(family_checkpoint(tmp_path)("gemma3n_text", "float32")), "gemma3n")
    assert (facts.hidden, facts.travels) == (32, 32) and (more.hidden, more.travels) == (32, 176)
    whole, part = Recipe(reconstruct="block"), Recipe()
    for recipe, wider in (
        (whole, 176 / 32),
        (part, (4 * 5 / 2 + 2 * 176 / 32) / 6),
    ):  # four streams, and two as a whole
        spooled = [
            estimate_shard(
                each, 0, 4, compute="fp32", resident="all", samples=20, length=50, microbatch=1, spool_memory=1 << 30,
                recipe=recipe, gpu=False,
            ).spool_memory
            for each in (facts, more)
        ]  # fmt: skip
        assert spooled[1] == wider * spooled[0]


def test_a_tied_head_is_counted_once(tiny_model: Callable[..., Path], facts: ModelInfo) -> None:
    tied = model_facts(read_config(tiny_model(tied=True)), "tied")
    assert facts.parameters - tied.parameters == 128 * 32


def test_estimates_grow_with_what_is_held(facts: ModelInfo) -> None:
    assert peak(facts, 1, 2) < peak(facts, 1, 3) < peak(facts, 0, 3)
    large = replace(facts, block_bytes=(10**9,) * 4)
    assert peak(large, resident="one") < peak(large, resident="all") - 2 * 10**9
    assert peak(facts, gpu=True) < peak(facts, gpu=False)
    assert peak(facts, recipe=None) < peak(facts)
    units = [
        estimated(facts, recipe=Recipe(reconstruct=unit)).training for unit in ("none", "matrix", "component", "block")
    ]
    assert units == sorted(units) and len(set(units)) == 4
    window = Recipe(reconstruct="window", blocks_per_unit=2)
    assert estimated(facts, recipe=window).training > units[-1]
    for demanding in ({"refine": "swaps"}, {"criterion": "sparsegpt"}, {"criterion": "alps"}, {"solve": True}):
        assert estimated(facts, recipe=Recipe(reconstruct="none", **demanding)).training > units[0]
    assert peak(facts, recipe=Recipe(sweeps=1, corrections=(0.5,))) > peak(facts, recipe=Recipe())
    assert peak(facts, samples=20) < peak(facts, samples=40)
    assert peak(facts, length=50) < peak(facts, length=60)
    assert estimated(facts, recipe=Recipe(batch=2)).training < estimated(facts, recipe=Recipe(batch=4)).training


def test_weights_count_as_they_are_stored_and_a_block_and_activations_as_they_are_computed(
    tiny_model: Callable[..., Path],
) -> None:
    model = tiny_model(dtype="bfloat16")
    narrow = model_facts(read_config(model), str(model), checkpoint=Checkpoint(model))
    assert narrow.dtype == "bfloat16" and narrow.total_bytes == 2 * narrow.parameters

    def estimate(compute: Compute, **changes: Any) -> ShardEstimate:
        usual = {"resident": "all", "samples": 20, "length": 50, "microbatch": 1, "spool_memory": 1 << 30, "gpu": False}
        return estimate_shard(narrow, 1, 3, compute=compute, **(usual | {"recipe": Recipe()} | changes))

    same, wide = estimate("bf16"), estimate("fp32")
    assert same.weights == wide.weights == sum(narrow.block_bytes[1:3])
    assert wide.spool_memory == 2 * same.spool_memory == 6 * 1000 * 32 * 4
    unit = max(component.parameters for component in narrow.components[1])
    assert wide.training - same.training > 2 * unit, "the working copy, and activations"
    idle = {"recipe": None, "samples": 0}
    assert estimate("fp32", **idle).peak - estimate("bf16", **idle).peak > 4 * narrow.block_parameters[1]


def test_a_plan_says_what_blocks_are_computed_in(
    tiny_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_model(dtype="bfloat16"))
    plans = {}
    for compute in ("auto", "fp32", "bf16"):
        assert main(["plan", model, "--samples", "8", "--length", "64", "--compute", compute, "--json"]) == 0
        plans[compute] = json.loads(capsys.readouterr().out)
    assert [plans[name]["compute"] for name in ("fp32", "bf16")] == ["fp32", "bf16"]
    assert plans["auto"]["compute"] == ("bf16" if has_units(torch.bfloat16, "cpu") else "fp32")
    assert plans["fp32"]["model"]["bytes"] == plans["bf16"]["model"]["bytes"]
    assert sum(s["spool_memory"] for s in plans["fp32"]["shards"]) == 2 * sum(
        s["spool_memory"] for s in plans["bf16"]["shards"]
    )


def test_swaps_are_the_default_where_reconstruction_costs_much_more(facts: ModelInfo) -> None:
    def refine(**asked: Any) -> str:
        config = PruneConfig(model="m", output="o", calibration="c", length=32, **{"criterion": "wanda"} | asked)
        return resolve_auto(config, facts).refine

    assert refine(samples=6) == "swaps", "6 × 32 tokens are four times the widest input, 48"
    assert refine(samples=5) == "none"
    assert refine(samples=100, reconstruct="none") == "none"
    assert refine(samples=100, criterion="alps") == "none", "its masks become worse"
    assert refine(samples=1, refine="swaps", reconstruct="none") == "swaps" and refine(refine="dsnot") == "dsnot"


def test_auto_chooses_among_the_lines_of_the_table(facts: ModelInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = PruneConfig(model="m", output="o", calibration="c", length=32, samples=9, criterion="wanda")
    chosen = [resolve_auto(asked, facts).refine]
    for start in (7, 6, None):  # 9 × 32 tokens are six times the widest input
        monkeypatch.setitem(REFINEMENTS, "slow", Refinement(function=lambda *_: None, auto_from=start))
        chosen.append(resolve_auto(asked, facts).refine)
    assert chosen == ["swaps", "swaps", "slow", "swaps"]


def test_activations_beyond_the_budget_go_to_disk(facts: ModelInfo) -> None:
    def estimate(budget: int):
        return estimate_shard(
            facts,
            0,
            4,
            compute="fp32",
            resident="all",
            samples=20,
            length=50,
            microbatch=1,
            spool_memory=budget,
            recipe=Recipe(),
            gpu=False,
        )

    all_in_memory, none = estimate(1 << 30), estimate(0)
    assert all_in_memory.spool_disk == 0 and none.spool_memory == 0
    assert none.spool_disk == all_in_memory.spool_memory == 6 * 1000 * 32 * 4, "of one block, and what is carried"
    assert all_in_memory.peak - none.peak == all_in_memory.spool_memory


def test_blocks_stay_in_memory_if_they_fit_and_go_one_by_one_if_not(facts: ModelInfo) -> None:
    large = replace(facts, block_bytes=(10**9,) * 4)
    estimates = {
        resident: [
            estimate_shard(
                large,
                0,
                4,
                compute="fp32",
                resident=resident,
                samples=0,
                length=16,
                microbatch=1,
                spool_memory=0,
                recipe=None,
                gpu=False,
            )
        ]
        for resident in ("all", "one")
    }
    assert choose_resident("auto", estimates, 10 * 10**9) == "all"
    assert choose_resident("auto", estimates, 4 * 10**9) == "one"
    with pytest.raises(Refusal, match=r"would need 4\.6 GB and has 4\.0 GB"):
        choose_resident("all", estimates, 4 * 10**9)
    with pytest.raises(Refusal, match=r"has 1\.0 GB"):
        choose_resident("auto", estimates, 10**9)


def test_the_fingerprint_tells_a_model_by_its_weights_too(model: Path) -> None:
    facts = model_facts(read_config(model), str(model))
    before = check_headers(facts, Checkpoint(model))
    assert check_headers(facts, Checkpoint(model)) == before
    weights = {name: tensor + 1e-3 for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert check_headers(facts, Checkpoint(model)) != before


def test_headers_that_do_not_match_the_config_are_refused(model: Path) -> None:
    facts = model_facts(read_config(model), str(model))
    weights = load_file(model / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    save_file(weights | {name: weights[name][:-1].clone()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(Refusal, match=rf"{name} is \(47, 32\), config.json says \(48, 32\)"):
        check_headers(facts, Checkpoint(model))
    del weights[name]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(Refusal, match=f"no tensor {name}"):
        check_headers(facts, Checkpoint(model))


# -- espalier plan -----------------------------------------------------------------------------------------------------


def planned(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_config_alone_is_enough_to_plan(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], facts: ModelInfo
) -> None:
    (tmp_path / "alone").mkdir()
    (model / "config.json").rename(tmp_path / "alone" / "config.json")
    options = ("--nodes", 2, "--gpus-per-node", 1, "--samples", 8, "--length", 64)
    plan = planned(capsys, tmp_path / "alone" / "config.json", *options)
    assert [(shard["first"], shard["last"]) for shard in plan["shards"]] == [(0, 1), (2, 3)]
    assert plan["model"]["bytes"] == facts.total_bytes and plan["tokens"] == 8 * 64
    assert plan["resident"] == "all" and plan["memory_per_shard"] == 80 * 10**9 - CONTEXT_BYTES
    assert plan["shards"] == planned(capsys, tmp_path / "alone", *options)["shards"], "as with the directory"


def test_a_plan_that_cannot_fit_is_refused_with_the_figures(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model), "--gpus-per-node", "1", "--gpu-memory", "1KB"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("espalier: resident auto: a shard would need") and line.count("\n") == 1


@pytest.mark.parametrize("wrong", [("--gpu-memory", "80 lots"), ("--length", "257"), ("--shards", "5")])
def test_a_wrong_option_of_plan_is_refused(
    model: Path, capsys: pytest.CaptureFixture[str], wrong: tuple[str, str]
) -> None:
    assert main(["plan", str(model), "--gpus-per-node", "8", *wrong]) == 2
    assert wrong[1] in capsys.readouterr().err


def test_the_table_of_a_plan_shows_every_shard(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model), "--shards", "3", "--memory", "64GB"]) == 0
    out = capsys.readouterr().out
    assert all(blocks in out for blocks in ("0-0", "1-2", "3-3"))
    assert "resident: all" in out
