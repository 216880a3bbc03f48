"""The table of refinements: what holds for every line of it, and that a line is all a new one needs."""

import pytest
import torch

from espalier.stages.criteria.scoring import score
from espalier.stages.errors import Refusal
from espalier.stages.masks import keep_mask
from espalier.stages.model.anatomy import Weight
from espalier.stages.recipe import Recipe
from espalier.stages.refine import REFINEMENTS, Refinement, find_refinement
from espalier.stages.shard.mask_selection import MaskSelector
from espalier.stages.statistics import InputStatistics

LAYER = Weight("mlp.up_proj", "mlp.up_proj", "mlp.up_proj.weight")


def layer(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, InputStatistics]:
    generator = torch.Generator().manual_seed(1)
    statistics = InputStatistics(48, hessian=True)
    statistics.update(torch.randn(3, 40, 48, generator=generator) + torch.randn(48, generator=generator))
    return torch.randn(64, 48, generator=generator).to(dtype), statistics


def selected(refine: str, pattern: tuple[int, int] | None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    recipe = Recipe(criterion="magnitude", refine=refine, sparsity=None if pattern else 0.5, pattern=pattern)
    keep, values = MaskSelector(recipe, 0, recipe.sparsity).choose(LAYER, *layer(dtype))
    assert values is None
    return keep


@pytest.mark.parametrize("pattern", [None, (2, 4), (1, 4)])
@pytest.mark.parametrize("name", REFINEMENTS)
def test_a_recipes_refinement_moves_zeros_and_leaves_as_many_in_each_row_or_group(name, pattern) -> None:
    bare, refined = selected("none", pattern), selected(name, pattern)
    assert not torch.equal(bare, refined), "it refines"
    width = pattern[1] if pattern else 48
    assert torch.equal(bare.view(64, -1, width).sum(-1), refined.view(64, -1, width).sum(-1))
    half = selected(name, pattern, torch.bfloat16).view(64, -1, width).sum(-1)
    assert torch.equal(half, bare.view(64, -1, width).sum(-1)), "weights of half precision too"


@pytest.mark.parametrize("name", REFINEMENTS)
def test_what_it_needs_is_what_the_recipe_gathers(name) -> None:
    needs = REFINEMENTS[name].needs
    assert Recipe(refine=name).needs == needs and Recipe(refine=name).gathers == ("hessian" in needs)
    _, statistics = layer()
    if "hessian" not in needs:
        statistics = InputStatistics(48)
        statistics.update(torch.randn(3, 40, 48, generator=torch.Generator().manual_seed(2)))
    weight, _ = layer()
    keep = keep_mask(score("magnitude", weight, statistics), 0.5)
    assert REFINEMENTS[name](weight, keep, statistics, None, lambda: None).sum() == keep.sum()


def test_scores_are_made_only_for_what_reads_them() -> None:
    weight, statistics = layer()
    keep, asked = keep_mask(score("magnitude", weight, statistics), pattern=(2, 4)), []

    def scores() -> torch.Tensor:
        asked.append(True)
        return score("magnitude", weight, statistics)

    for name, refinement in REFINEMENTS.items():
        asked.clear()
        refinement(weight, keep, statistics, (2, 4), scores)
        assert bool(asked) == (name == "dsnot")
    asked.clear()
    REFINEMENTS["dsnot"](weight, keep_mask(score("magnitude", weight, statistics), 0.5), statistics, None, scores)
    assert not asked, "outside groups it goes by the expected error alone"


def test_a_name_without_a_line_is_refused_and_never_taken_for_another() -> None:
    for refused in (lambda: find_refinement("dsnott"), lambda: Recipe(refine="dsnott").needs):
        with pytest.raises(Refusal, match=r"refine 'dsnott' is unknown; did you mean dsnot\? there are: dsnot, r2"):
            refused()
    with pytest.raises(Refusal, match="dsnott"):
        selected("dsnott", None)


def test_a_line_is_all_that_a_new_one_needs(monkeypatch) -> None:
    def backwards(weight, keep, statistics, pattern):
        return keep.flip(1)

    monkeypatch.setitem(REFINEMENTS, "backwards", Refinement(function=backwards, needs=frozenset({"outputs"})))
    assert torch.equal(selected("backwards", None), selected("none", None).flip(1))
    assert Recipe(refine="backwards").needs == {"outputs"}
