"""Statistics gathered when a unit's turn comes: stage by stage, and beside the dense model's, against float64 sums."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from family_models import LAYERS, family_checkpoint
from safetensors.torch import load_file
from streaming import make_shards, prune, stream
from torch import Tensor, nn

from espalier.stages.masks import masked
from espalier.stages.model.anatomy import Weight
from espalier.stages.recipe import BlockTask, Recipe
from espalier.stages.reconstruction.passes import UnitPasses
from espalier.stages.reconstruction.units import Group, groups_of
from espalier.stages.shard.calibration import BlockCalibration
from espalier.stages.shard.gathering import gather, stages_of
from espalier.stages.shard.shard import Shard
from espalier.stages.shard.spec import block_file

LENGTH, SAMPLES = 16, 6
CORRECTED = Recipe(criterion="alps", targets="corrected", reconstruct="none")


@pytest.fixture
def shard(tiny_checkpoint: Callable[..., Path], tiny_tokens: Callable[..., Tensor], tmp_path: Path) -> Shard:
    (made,) = make_shards(tiny_checkpoint(), tmp_path, 1, LENGTH, recipe=CORRECTED)
    stream([made], tiny_tokens(SAMPLES, LENGTH), 0)
    return made


def whole_block(calibration: BlockCalibration) -> Group:
    (group,) = groups_of({1: calibration.anatomy}, {1: calibration.call}, CORRECTED.pruned_together)
    return group


@contextmanager
def reading(block: nn.Module, module: str) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = block.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    yield seen
    handle.remove()


def names(weights: list[Weight]) -> list[str]:
    return [weight.name.rpartition(".")[2] for weight in weights]


def test_weights_that_read_one_tensor_are_a_stage_in_the_order_data_passes_them(shard: Shard) -> None:
    calibration = shard.gather(BlockTask(blocks=(1,)))[1]
    unit, anatomies = whole_block(calibration).whole, {1: calibration.anatomy}
    (everything,) = stages_of(unit, anatomies, corrected=False)
    assert len(everything.parameters()) == 7
    stages = stages_of(unit, anatomies, corrected=True)
    read = [names([weight for weights in stage.parameters().values() for weight in weights]) for stage in stages]
    assert read == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


@pytest.mark.parametrize("place, module", [(1, "self_attn.o_proj"), (2, "mlp.gate_proj"), (3, "mlp.down_proj")])
def test_cross_sums_pair_what_is_read_now_with_what_was_read_in_the_dense_block(
    shard: Shard, place: int, module: str
) -> None:
    calibration = shard.gather(BlockTask(blocks=(1,)))[1]
    unit = whole_block(calibration).whole
    inputs = calibration.inputs[unit.source]
    dense = shard.blocks.hold([1])[0][1]
    pruned = shard.skeleton.assembled(1, dict(dense.state_dict()))
    halved = {  # q, k, v lose every second column
        name: masked(weight, torch.arange(weight.shape[1]).expand_as(weight) % 2 == 0)
        for name, weight in dense.state_dict().items()
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    }
    pruned.load_state_dict(halved, strict=False, assign=True)
    stage = stages_of(unit, {1: calibration.anatomy}, corrected=True)[place]
    passes = [UnitPasses(unit, {1: module}, inputs) for module in (pruned, dense)]
    gathered = gather(passes[0], stage, CORRECTED.needs, "cpu", passes[1])
    found = gathered[1][module]
    assert list(gathered) == [1] and {id(statistics) for statistics in gathered[1].values()} == {id(found)}
    everything = inputs.batch(list(range(SAMPLES)))
    seen = []
    for block in (pruned, dense):
        with torch.no_grad(), reading(block, module) as tensors:
            calibration.call.at(list(range(SAMPLES))).run(block, everything)
        seen.append(torch.cat([each.reshape(-1, each.shape[-1]) for each in tensors]).double())
    now, before = seen
    assert not torch.allclose(now, before)
    assert found.cross is not None and found.gram is not None and found.tokens == SAMPLES * LENGTH
    torch.testing.assert_close(found.cross.double(), now.T @ before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.gram.double(), now.T @ now, rtol=1e-5, atol=1e-5)


def test_a_pass_ends_where_all_that_was_looked_for_has_been_read(shard: Shard) -> None:
    calibration = shard.gather(BlockTask(blocks=(1,)))[1]
    unit = whole_block(calibration).whole
    block = shard.blocks.hold([1])[0][1]
    stage = stages_of(unit, {1: calibration.anatomy}, corrected=True)[1]
    with reading(block, "mlp.down_proj") as seen:
        gather(UnitPasses(unit, {1: block}, calibration.inputs[unit.source]), stage, CORRECTED.needs, "cpu")
    assert not seen


def test_corrected_targets_bring_blocks_nearer_to_the_dense_ones(
    tiny_checkpoint: Callable[..., Path], tiny_tokens: Callable[..., Tensor], tmp_path: Path
) -> None:
    """Over the calibration's own tokens, of which there are several for each weight that stays."""
    tokens, model, apart = tiny_tokens(SAMPLES * 8, LENGTH), tiny_checkpoint(), {}
    (dense,) = make_shards(model, tmp_path / "dense", 1, LENGTH, recipe=CORRECTED)
    stream([dense], tokens, 0)
    kept = {block: dense.gather(BlockTask(blocks=(block,)))[block] for block in range(4)}
    everything = list(range(len(tokens)))
    for targets in ("plain", "corrected"):
        recipe = Recipe(criterion="alps", sparsity=0.7, targets=targets, reconstruct="none")
        home = tmp_path / targets
        prune(make_shards(model, home, 1, LENGTH, recipe=recipe), tokens)
        for block, module in dense.blocks.hold(range(4))[0].items():
            inputs = kept[block].inputs["block"].batch(everything)
            written = load_file(home / "output" / block_file(block))
            own = {name.removeprefix(f"model.layers.{block}."): tensor for name, tensor in written.items()}
            pruned = dense.skeleton.assembled(block, own)
            with torch.no_grad():
                outputs = [kept[block].call.at(everything).run(each, inputs) for each in (pruned, module)]
            apart[block, targets] = float((outputs[0] - outputs[1]).square().sum())
    assert all(apart[block, "corrected"] < apart[block, "plain"] for block in range(4))


@pytest.mark.parametrize("family", ["mixtral", "gpt_neox", "gpt2", "deepseek_v3"])
def test_families_are_pruned_in_stages_to_the_exact_count(
    tmp_path: Path, tiny_tokens: Callable[..., Tensor], family: str
) -> None:
    (shard,) = make_shards(family_checkpoint(tmp_path)(family), tmp_path, 1, LENGTH, blocks=LAYERS, recipe=CORRECTED)
    for report in prune([shard], tiny_tokens(SAMPLES, LENGTH)):
        for name, layer in report["layers"].items():
            assert layer["zeros"] == layer["weights"] // 2, name
