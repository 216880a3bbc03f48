"""A family that nobody has tried: a small model of it goes all the way, or the refusal says where it stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from espalier.pipeline.run import new_family
from espalier.stages.errors import Refusal
from espalier.stages.loading.skeleton import Skeleton
from espalier.stages.model.families import BlockLayout
from espalier.stages.shard import probe as probing
from espalier.stages.shard.probe import TRIED, probe, small_config

FULL_SIZE = ("arcee", "helium", "granitemoe", "phimoe", "persimmon", "gpt_bigcode", "gptj", "falcon", "openai-gpt")


def skeleton_of(family: str, **changes: Any) -> Skeleton:
    return Skeleton(AutoConfig.for_model(family, **changes), torch.float32)


@pytest.mark.parametrize("family", FULL_SIZE)
def test_a_family_at_its_published_size_is_tried_small_and_told_once(family: str, tmp_path: Path) -> None:
    assert family not in TRIED
    skeleton, memory = skeleton_of(family), tmp_path / "cache" / "families.json"
    line = probe(skeleton, tmp_path, memory)
    assert line is not None and line.startswith(
        f"{family}: new here; a small random model of it, 2 blocks, was streamed"
    )
    assert probe(skeleton, tmp_path, memory) is None  # it is known now
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("family", ["granitemoe", "bloom", "mpt"])
def test_one_that_is_only_to_be_trained_needs_less(family: str, tmp_path: Path) -> None:
    skeleton, memory = skeleton_of(family), tmp_path / "families.json"
    line = probe(skeleton, tmp_path, memory, "train")
    assert line is not None and line.endswith("2 blocks, was trained, and loaded tensor by tensor")
    assert probe(skeleton, tmp_path, memory, "train") is None
    if family == "granitemoe":  # what was only trained has not passed for pruning, and the other way about it has
        assert (probe(skeleton, tmp_path, memory) or "").endswith("streamed, pruned and loaded back exactly")
        memory.write_text(memory.read_text().replace(" train", " else"))
        assert probe(skeleton, tmp_path, memory, "train") is None


@pytest.mark.parametrize(
    ("broken", "where"),
    [
        ("cross_entropy", "training it failed .*its loss is .*, and that of the next token"),
        ("prunable", "looking for its matrices failed"),
        ("hollow_model", "loading it tensor by tensor failed .*embed_tokens.weight is another than in the whole model"),
    ],
)
def test_what_training_needs_and_is_not_so_is_a_difference(
    broken: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others: dict[str, Any] = {
        "cross_entropy": lambda *_: torch.tensor(1.0),
        "prunable": lambda *_: {},
        "hollow_model": lambda *_: (None, lambda name: torch.zeros(())),
    }
    monkeypatch.setattr(probing, broken, others[broken])
    with pytest.raises(Refusal, match=f"model family 'helium' is not supported: {where}"):
        probe(skeleton_of("helium"), tmp_path, None, "train")


@pytest.mark.parametrize(
    ("family", "where"),
    [
        ("bert-generation", "predicting the next token failed .*each token sees those after it, as in an encoder"),
        ("trocr", "looking at how it calls its components failed"),
        ("bloom", "looking at how it calls its components failed .*self_attention is given more that hangs on the"),
        ("mpt", "looking at how it calls its components failed .*ffn is given more that hangs on the tokens"),
        ("xlnet", "cutting its config failed"),
    ],
)
def test_one_that_does_not_work_is_refused_with_the_step_that_failed(family: str, where: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=f"model family '{family}' is not supported: {where}"):
        probe(skeleton_of(family), tmp_path, None)
    assert not list(tmp_path.iterdir())


def test_the_experts_of_a_large_model_take_no_memory_before_they_are_weights() -> None:
    """A block's are one tensor of 962 GB: no host would have it for a moment."""
    config = AutoConfig.for_model("mixtral", num_local_experts=512, hidden_size=7168, intermediate_size=1 << 15)
    skeleton = Skeleton(config, torch.float32)
    experts = skeleton.layers[0].state_dict()["mlp.experts.gate_up_proj"]
    assert experts.is_meta and 4 * experts.numel() > 9e11
    assert all(buffer.device.type == "cpu" for buffer in skeleton.model.buffers())


def test_a_small_config_keeps_what_belongs_together() -> None:
    settings = {"n_embd": 4096, "n_head": 16, "rotary_dim": 64, "n_layer": 28}
    small = small_config(AutoConfig.for_model("gptj", **settings), skeleton_of("gptj", **settings).layers)
    assert small.rotary_dim <= small.n_embd // small.n_head and small.n_layer == 2
    inside = {"attn_config": {"kv_n_heads": 8, "rope_theta": 5e5}, "ffn_config": {"moe_num_experts": 16}}
    small = small_config(AutoConfig.for_model("dbrx", **inside), skeleton_of("dbrx", **inside).layers)
    assert small.n_heads % small.attn_config.kv_n_heads == 0 and small.ffn_config.moe_num_experts == 8


def test_matrices_that_would_stay_dense_unsaid_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "prunable", lambda layer, layout: {})
    with pytest.raises(
        Refusal, match=r"looking for its matrices failed .*q_proj.weight .* is no linear, expert or router"
    ):
        probe(skeleton_of("helium"), tmp_path, None)


def test_another_value_anywhere_is_a_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = probing.Shard.forward
    monkeypatch.setattr(probing.Shard, "forward", lambda self, *args: forward(self, *args) * (1 + 2**-20))
    with pytest.raises(Refusal, match="gives other values than in the whole model"):
        probe(skeleton_of("helium"), tmp_path, None)


def test_a_memory_that_cannot_be_written_to_or_read_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "broken.json").write_text("{")
    for memory in (tmp_path / "file" / "families.json", tmp_path / "broken.json"):
        assert probe(skeleton_of("helium"), tmp_path, memory) is not None


def test_a_tried_family_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(new_family, "Skeleton", None)
    assert new_family.tried(AutoConfig.for_model("llama")) == ()


def test_every_family_that_counts_as_tried_is_tested() -> None:
    from family_models import NAMES

    assert {name.partition(".")[0] for name in NAMES} >= TRIED
    assert isinstance(skeleton_of("helium", num_hidden_layers=2).layout, BlockLayout)
