"""Every way to prune and reconstruct, on plain shards: exact, the same bytes however the work is cut, and better for
it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from streaming import GENTLE, make_shards, prune, stream, worked

from espalier.stages.criteria.scoring import find_criterion
from espalier.stages.errors import OutOfStep, Refusal
from espalier.stages.layer_rules import Override
from espalier.stages.recipe import BlockTask, Recipe, block_windows
from espalier.stages.reconstruction.target import SHARE
from espalier.stages.reconstruction.units import UnitModules, groups_of
from espalier.stages.shard.spec import block_file

LENGTH, SAMPLES, BLOCKS = 16, 12, 4
RECIPES = {
    "matrix": Recipe(reconstruct="matrix"),
    "block": Recipe(reconstruct="block"),
    "window": Recipe(reconstruct="window", blocks_per_unit=3, refine="swaps"),
    "pruned": Recipe(inputs="pruned", refine="swaps"),
    "pruned window": Recipe(inputs="pruned", reconstruct="window", blocks_per_unit=2),
    "pruned matrix": Recipe(inputs="pruned", reconstruct="matrix", criterion="ria"),
    "pruned bare": Recipe(inputs="pruned", reconstruct="none", refine="dsnot"),
    "sweeps": Recipe(sweeps=2, corrections=(0.3, 0.6), refine="r2-dsnot"),
    "sweeps of blocks": Recipe(reconstruct="block", sweeps=1, corrections=(1.0,), pattern=(2, 4), sparsity=None),
    "sweeps of windows": Recipe(reconstruct="window", blocks_per_unit=2, sweeps=1, corrections=(0.5,)),
    "foreseeing sweeps": Recipe(sweeps=2),
    "foreseeing sweeps of windows": Recipe(reconstruct="window", blocks_per_unit=2, sweeps=1),
    "sparsegpt": Recipe(criterion="sparsegpt", reconstruct="none"),
    "sparsegpt, pruned": Recipe(criterion="sparsegpt", refine="swaps", inputs="pruned"),
    "sparsegpt's mask": Recipe(
        criterion="sparsegpt", criterion_options={"update": False}, pattern=(4, 8), sparsity=None
    ),
    "alps": Recipe(criterion="alps", reconstruct="none"),
    "alps in rows": Recipe(criterion="alps", scope="row", refine="swaps"),
    "alps, pruned": Recipe(criterion="alps", inputs="pruned", sparsity=None, pattern=(2, 4)),
    "solved": Recipe(solve=True, refine="dsnot"),
    "solved, pruned": Recipe(criterion="ria", solve=True, inputs="pruned", reconstruct="matrix"),
    "corrected": Recipe(criterion="alps", targets="corrected", reconstruct="none"),
    "corrected components": Recipe(solve=True, refine="swaps", targets="corrected"),
    "corrected, pruned windows": Recipe(
        solve=True, targets="corrected", inputs="pruned", reconstruct="window", blocks_per_unit=2
    ),
    "corrected, pruned bare": Recipe(criterion="alps", targets="corrected", inputs="pruned", reconstruct="none"),
    "symwanda": Recipe(criterion="symwanda", reconstruct="none"),
    "stochria": Recipe(criterion="stochria", criterion_options={"ratio": 0.5}, reconstruct="none", seed=3),
    "matrix scope": Recipe(criterion="owanda", scope="matrix", reconstruct="none"),
}
RECIPES = {name: replace(recipe, learning_rate=GENTLE) for name, recipe in RECIPES.items()}

pytestmark = pytest.mark.slow


def files(home: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((home / "output").glob("*.safetensors"))}


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_bytes_for_any_cut_and_exact_zeros(
    tiny_checkpoint: Callable[..., Path], tiny_tokens: Callable[..., torch.Tensor], tmp_path: Path, name: str
) -> None:
    model, tokens, recipe = tiny_checkpoint(), tiny_tokens(SAMPLES, LENGTH), RECIPES[name]
    made = []
    ways = [{"shards": 1}, {"shards": 2, "resident": "one", "spool_memory": 0}]
    for place, way in enumerate(ways):
        shards = make_shards(model, tmp_path / str(place), length=LENGTH, recipe=recipe, **way)
        reports = prune(shards, tokens)
        assert [report["block"] for report in reports] == list(range(BLOCKS))
        assert all(shard.budget.used == 0 for shard in shards)
        made.append(files(tmp_path / str(place)))
    assert made[0] == made[1] and len(made[0]) == BLOCKS
    share = 0.5 if (recipe.scope or find_criterion(recipe.criterion).scopes[:1]) in ("row", ("row",)) else None
    for index in range(BLOCKS):
        for key, weight in load_file(tmp_path / "0" / "output" / block_file(index)).items():
            if not key.endswith("_proj.weight"):
                continue
            zeros = weight == 0
            more = int(zeros.sum()) - weight.numel() // 2  # SparseGPT: one a stretch of columns, as the reference
            assert more in ((0, 1) if recipe.criterion == "sparsegpt" and not recipe.pattern else (0,)), key
            if recipe.pattern:
                kept, group = recipe.pattern
                assert ((~zeros).view(-1, group).sum(-1) == kept).all(), key
            elif share:
                assert (zeros.sum(-1) == weight.shape[1] // 2).all(), key
    for report in reports:
        for unit in report["units"]:
            assert unit["error_after"] <= unit["error_before"]


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_solved_values_leave_less_to_reconstruct_on_the_same_masks(
    tiny_checkpoint: Callable[..., Path], tiny_tokens: Callable[..., torch.Tensor], tmp_path: Path, criterion: str
) -> None:
    errors, zeros = [], []
    for solve in (False, True):
        recipe = Recipe(
            criterion=criterion, refine="swaps", solve=solve, reconstruct="matrix", learning_rate=GENTLE
        )  # with swaps both read the same statistics
        home = tmp_path / str(solve)
        shards = make_shards(tiny_checkpoint(), home, 1, LENGTH, recipe=recipe)
        reports = prune(shards, tiny_tokens(SAMPLES * 16, LENGTH))  # many for each value: the held-out eighth judges
        errors.append(sum(unit["error_before"] for report in reports for unit in report["units"]))
        tensors = [load_file(home / "output" / block_file(index)) for index in range(BLOCKS)]
        zeros.append([w == 0 for block in tensors for name, w in block.items() if name.endswith("_proj.weight")])
    assert errors[1] < (0.9 if criterion == "wanda" else 1) * errors[0]
    assert all(torch.equal(one, other) for one, other in zip(*zeros, strict=True))


def test_overrides_and_ratios_of_blocks_reach_their_layers(
    tiny_checkpoint: Callable[..., Path], tiny_tokens: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    overrides = (
        Override(match="*.mlp.*", changes={"sparsity": None, "pattern": (1, 4)}),
        Override(match="0.mlp.down_proj", changes={"sparsity": 0.0, "pattern": None}),
        Override(match="*.o_proj", changes={"criterion": "magnitude", "criterion_options": {}}),
    )
    recipe = Recipe(reconstruct="none", overrides=overrides, allocation="owl")
    (shard,) = make_shards(tiny_checkpoint(), tmp_path, 1, LENGTH, recipe=recipe)
    stream([shard], tiny_tokens(SAMPLES, LENGTH), 0, shares=True)
    shares = [shard.outlier_share(index) for index in range(BLOCKS)]
    assert all(0 <= share < 0.5 for share in shares)
    (report,) = worked(shard, BlockTask(blocks=(0,), sparsity=(0.25,)))
    ratios = {name: layer["zeros"] / layer["weights"] for name, layer in report["layers"].items()}
    assert ratios == {
        **dict.fromkeys((f"self_attn.{which}_proj" for which in "qkvo"), 0.25),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), 0.75),
        "mlp.down_proj": 0.0,
    }


def test_foreseen_inputs_are_the_pruned_models_drawn_to_the_dense_at_every_unit(
    tiny_checkpoint: Callable[..., Path], tiny_tokens: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    tokens, everything = tiny_tokens(SAMPLES, LENGTH), list(range(SAMPLES))
    (shard,) = make_shards(tiny_checkpoint(), tmp_path, 1, LENGTH, recipe=RECIPES["foreseeing sweeps"])
    stream([shard], tokens, 0)
    for block in range(BLOCKS):
        shard.work(BlockTask(blocks=(block,)))
    shard.open((None, 0))
    stream([shard], tokens, 1, streams=2)
    calibrations = {block: shard.gather(BlockTask(blocks=(block,), sweep=1))[block] for block in range(BLOCKS)}
    foreseen, units = calibrations[0].inputs["self_attn"].batch(everything), 0
    for block, module in shard.blocks.hold(range(BLOCKS))[1].items():
        kept = calibrations[block]
        for group in groups_of({block: kept.anatomy}, {block: kept.call}, "component"):
            unit = group.whole
            dense, given = (spools[unit.source].batch(everything) for spools in (kept.inputs, kept.drifted))
            torch.testing.assert_close(given, foreseen)
            calls = [step.call.at(everything) for step in unit.steps]
            foreseen = given + UnitModules(unit, {block: module})(given, calls) + SHARE * (dense - given)
            units += 1
    assert units == 2 * BLOCKS and not torch.allclose(given, dense, atol=0.01)


def test_work_out_of_order_is_out_of_step(
    tiny_checkpoint: Callable[..., Path], tiny_tokens: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    (shard,) = make_shards(tiny_checkpoint(), tmp_path, 1, LENGTH, recipe=RECIPES["pruned bare"])
    with pytest.raises(OutOfStep, match="holds no inputs of its blocks"):
        shard.work(BlockTask(blocks=(0,)))
    (other,) = make_shards(tiny_checkpoint(), tmp_path / "b", 1, LENGTH, recipe=RECIPES["sweeps"])
    stream([other], tiny_tokens(SAMPLES, LENGTH), 1)
    with pytest.raises(OutOfStep, match="other blocks than sweep 1 starts from"):
        other.work(BlockTask(blocks=(0,), sweep=1))


def test_matrices_stored_with_other_experts_are_not_reconstructed_alone(tmp_path: Path) -> None:
    from espalier.stages.model.anatomy import Anatomy, Unit, Weight
    from espalier.stages.model.calls import Call
    from espalier.stages.reconstruction.units import groups_of

    weight = Weight("mlp.experts.0.down_proj", "mlp.experts.down_proj", "mlp.experts", expert=0)
    call = Call((), {}, None)
    anatomy = Anatomy([Unit("mlp", weights=(weight,))], [(weight,)], {"mlp": call})
    with pytest.raises(Refusal, match=r"mlp.experts.0.down_proj of block 0 is stored with the other experts"):
        groups_of({0: anatomy}, {0: call}, "matrix")


def test_windows_start_at_multiples_whatever_the_shard() -> None:
    assert block_windows(range(7), 3) == [(0, 1, 2), (3, 4, 5), (6,)]
    assert block_windows(range(3, 7), 3) == [(3, 4, 5), (6,)]
    assert block_windows(range(2, 4), 1) == [(2,), (3,)]


@pytest.mark.parametrize("name", ["block", "sweeps", "foreseeing sweeps", "pruned", "corrected components"])
@pytest.mark.parametrize("resident", ["all", "one"])
def test_what_is_set_aside_does_not_grow_with_the_blocks(
    tiny_checkpoint: Callable[..., Path],
    tiny_tokens: Callable[..., torch.Tensor],
    tmp_path: Path,
    name: str,
    resident: Literal["all", "one"],
) -> None:
    peaks = []
    for blocks in (2, 8):
        home, model = tmp_path / str(blocks), tiny_checkpoint(blocks=blocks)
        recipe = RECIPES[name]
        made = make_shards(model, home, 1, LENGTH, blocks=blocks, recipe=recipe, resident=resident)
        prune(made, tiny_tokens(SAMPLES, LENGTH))
        peaks.append(made[0].budget.peak)
    stream_bytes = SAMPLES * LENGTH * 32 * 4
    assert 0 < peaks[0] <= 12 * stream_bytes
    assert peaks[1] <= 1.1 * peaks[0]
