"""The table of reconstruction units: a line is all that the request, the plan, the work and the report need."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from streaming import GENTLE, make_shards, prune

from espalier.pipeline.config.prune import PruneConfig, parse_reconstruct
from espalier.pipeline.reports.prune import sentence
from espalier.stages.errors import Refusal
from espalier.stages.recipe import Recipe
from espalier.stages.reconstruction.units import UNITS, Group, find_unit, groups_of

LENGTH, SAMPLES = 16, 12


def pruned(model: Path, tokens: torch.Tensor, home: Path, recipe: Recipe) -> tuple[dict[str, bytes], list[str]]:
    reports = prune(make_shards(model, home, 2, LENGTH, recipe=replace(recipe, learning_rate=GENTLE)), tokens)
    names = [unit["name"] for report in reports for unit in report["units"]]
    return {path.name: path.read_bytes() for path in sorted((home / "output").glob("*.safetensors"))}, names


def test_a_line_is_all_that_a_new_unit_needs(
    tiny_checkpoint: Callable[..., Path],
    tiny_tokens: Callable[..., torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def mlps(anatomies, calls) -> list[Group]:
        """Components as they are, of which only the MLPs are fitted."""
        groups = groups_of(anatomies, calls, "component")
        return [group if group.whole.name == "mlp" else Group(group.whole, ()) for group in groups]

    mlp = replace(UNITS["component"], groups=mlps, sweep_streams=None, written="mlp", title="MLP by MLP")
    monkeypatch.setitem(UNITS, "mlp", mlp)
    together = replace(UNITS["window"], written="together:N", title="{blocks} blocks in one")
    monkeypatch.setitem(UNITS, "together", together)

    asked = {"model": "m", "output": "o", "calibration": "c"}
    config = PruneConfig(**asked, criterion="wanda", reconstruct="together:2", sweeps=1)
    assert (config.block_recipe.reconstruct, config.block_recipe.blocks_per_unit) == ("together", 2)
    with pytest.raises(ValueError, match="a sweep takes component, block, window:N or together:N"):
        PruneConfig(**asked, reconstruct="mlp", sweeps=1)
    assert "reconstructed 2 blocks in one" in sentence(
        {"config": config.model_dump(), "model": {"path": "m", "blocks": 4}}
    )

    model, tokens = tiny_checkpoint(), tiny_tokens(SAMPLES, LENGTH)
    window, _ = pruned(model, tokens, tmp_path / "w", Recipe(reconstruct="window", blocks_per_unit=2, sweeps=1))
    same, _ = pruned(model, tokens, tmp_path / "t", config.block_recipe)
    assert window == same
    _, names = pruned(model, tokens, tmp_path / "m", Recipe(reconstruct="mlp"))
    assert names == ["mlp"] * 4


def test_a_name_without_a_line_is_refused_and_never_taken_for_another() -> None:
    for refused in (lambda: find_unit("layer"), lambda: groups_of({}, {}, "layer")):
        with pytest.raises(Refusal, match="reconstruct 'layer' is unknown; there are: matrix, component"):
            refused()
    assert find_unit("none") is None


@pytest.mark.parametrize("text", ["layer", "block:2", "window", "window:0", "window:a", "none:1", ""])
def test_what_cannot_be_read_as_a_unit(text: str) -> None:
    with pytest.raises(Refusal, match=r"choose matrix, component \(attention and MLP apart\), block, window:N"):
        parse_reconstruct(text)


@pytest.mark.parametrize("name", UNITS)
def test_every_unit_is_read_as_it_is_written(name: str) -> None:
    written = f"{name}:3" if UNITS[name].numbered else name
    assert parse_reconstruct(written) == (name, 3 if UNITS[name].numbered else 1)
    assert UNITS[name].written.startswith(f"{name}:N" if UNITS[name].numbered else name)
