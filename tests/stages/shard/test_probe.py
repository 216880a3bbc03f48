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
from espalier.stages.shard.probe import TRIED, probe

FULL_SIZE = ("arcee", "helium", "granitemoe", "phimoe", "persimmon", "gpt_bigcode")


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


@pytest.mark.parametrize(
    ("family", "where"),
    [("bloom", "streaming block by block failed"), ("falcon", "streaming block by block failed")],
)
def test_one_that_does_not_stream_is_refused_with_the_step_that_failed(family: str, where: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=f"model family '{family}' is not supported: {where}"):
        probe(skeleton_of(family), tmp_path, None)
    assert not list(tmp_path.iterdir())


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
