"""Passes through a unit go on from what those before them kept: the same bits as from the start, and less work."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import LAYERS, family_checkpoint
from streaming import make_shards, prune
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from espalier.stages.model.anatomy import Closing
from espalier.stages.recipe import Recipe
from espalier.stages.reconstruction.passes import Place, UnitPasses
from espalier.stages.shard import block_pruner, gathering

LENGTH, SAMPLES = 16, 12
UNITS = {
    "block": Recipe(criterion="alps", targets="corrected", reconstruct="none"),
    "window": Recipe(criterion="alps", targets="corrected", reconstruct="window", blocks_per_unit=2),
    "pruned": Recipe(criterion="alps", targets="corrected", reconstruct="none", inputs="pruned"),
}
ALL_ANEW = {  # its attention also gives its weights; experts go first, on inputs that the dense unit never reads
    *(("gemma2", unit) for unit in ("block", "pruned")),
    ("mixtral", "pruned"),
}


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch, anew: bool = False) -> Iterator[tuple[Counter[str], list[Tensor]]]:
    """How often linears are computed while statistics are gathered, by name, and all those sums; with `anew` by passes
    that keep nothing."""
    calls, sums, run = Counter[str](), list[Tensor](), gathering.gather

    def gathered(passes: UnitPasses, *args: Any) -> gathering.Gathered:
        handles = [
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
            for side in (passes, args[3])
            if side is not None
            for block in side.modules.values()
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        ]
        found = run(passes, *args)
        for handle in handles:
            handle.remove()
        for one in {id(each): each for block in found.values() for each in block.values()}.values():
            sums.extend(each.clone() for each in (one.gram, one.cross) if each is not None)
        return found

    def nothing(*args: Any) -> dict[Place, Closing]:
        return {}

    with monkeypatch.context() as patched:
        patched.setattr(block_pruner, "gather", gathered)
        if anew:
            patched.setattr(block_pruner, "closing_of", nothing)
            patched.setattr(UnitPasses, "to_enter", lambda *_: None)
        yield calls, sums


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "gpt_neox", "opt", "deepseek_v3", "gemma2"])
@pytest.mark.parametrize("unit", UNITS)
def test_the_same_bits_are_read_as_from_the_start(
    tmp_path: Path, tiny_tokens: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, family: str, unit: str
) -> None:
    model, tokens, found, calls = family_checkpoint(tmp_path)(family), tiny_tokens(SAMPLES, LENGTH), [], []
    for anew in (False, True):
        (shard,) = make_shards(model, tmp_path / str(anew), 1, LENGTH, blocks=LAYERS, recipe=UNITS[unit])
        with counting(monkeypatch, anew) as (counted, sums):
            prune([shard], tokens)
        assert shard.budget.used == 0
        found.append(sums)
        calls.append(counted)
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(kept, anew) for kept, anew in zip(*found, strict=True))
    assert all(calls[0][name] <= calls[1][name] for name in calls[0])
    assert (family, unit) in ALL_ANEW or calls[0].total() < calls[1].total()


@pytest.mark.parametrize("unit", ["block", "pruned"])
def test_attention_and_mlp_are_computed_once_in_each_of_the_two_models(
    tiny_checkpoint: Callable[..., Path], tiny_tokens: Callable[..., Tensor], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, unit: str,
) -> None:  # fmt: skip
    (shard,) = make_shards(tiny_checkpoint(), tmp_path, 1, LENGTH, recipe=UNITS[unit])
    with counting(monkeypatch) as (calls, _):
        prune([shard], tiny_tokens(SAMPLES, LENGTH))
    assert {name.rpartition(".")[2]: count / 4 for name, count in calls.items()} == {
        "q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 4, "gate_proj": 2, "up_proj": 2,
    }  # fmt: skip


def test_a_mixture_is_read_in_the_dense_unit_first(
    tmp_path: Path, tiny_tokens: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass for the experts, which keeps what the dense attention gives; then that of the pruned one."""
    model = family_checkpoint(tmp_path)("mixtral")
    (shard,) = make_shards(model, tmp_path, 1, LENGTH, blocks=LAYERS, recipe=UNITS["block"])
    with counting(monkeypatch) as (calls, _):
        prune([shard], tiny_tokens(SAMPLES, LENGTH))
    assert {name: calls[name] / LAYERS for name in calls if name.startswith("self_attn")} == {
        f"self_attn.{name}_proj": count for name, count in (("q", 2), ("k", 2), ("v", 2), ("o", 1))
    }
