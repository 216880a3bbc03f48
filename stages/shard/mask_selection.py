"""Which weights of one matrix survive: its criterion's scores, its pattern's mask, and that mask refined."""

from typing import Any

import torch
from torch import Tensor

from espalier.stages.alps import solve
from espalier.stages.criteria.criterion import Target
from espalier.stages.criteria.scoring import find_criterion, score, score_rows
from espalier.stages.layer_rules import LayerRule
from espalier.stages.masks import keep_mask
from espalier.stages.model.anatomy import Weight
from espalier.stages.recipe import Recipe, derived_seed
from espalier.stages.refine import find_refinement
from espalier.stages.statistics import InputStatistics

EXPERT_TOKENS = 32  # an expert that got fewer is pruned by magnitude: a channel's norm over n tokens is off by about
# 1/√(2n) of itself for normal activations (12 % at 32), more for those with outliers


class MaskSelector:
    """Masks for the matrices of one block. `fallbacks`: the weights that were pruned by magnitude, and why: their
    expert's tokens, too few for the criterion."""

    def __init__(self, recipe: Recipe, block: int, sparsity: float | None) -> None:
        self.recipe, self.block, self.sparsity = recipe, block, sparsity
        self.fallbacks: dict[str, int] = {}

    def choose(
        self, weight: Weight, matrix: Tensor, statistics: InputStatistics, importance: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Which weights of `matrix` (O, I) survive, bool (O, I), and their values where the criterion moves them.

        `importance` (O, I) is what the shadow says of them, where there is one."""
        recipe, rule = self.recipe, self.recipe.rule(self.block, weight.name, self.sparsity)
        if rule.dense:
            return torch.ones(matrix.shape, dtype=torch.bool, device=matrix.device), None
        name, options = rule.criterion, dict(rule.criterion_options)
        few = weight.expert is not None and statistics.tokens < EXPERT_TOKENS
        if few and name != "magnitude" and not find_criterion(name).from_shadow:
            self.fallbacks[weight.name] = statistics.tokens
            name, options = "magnitude", {}
        criterion = find_criterion(name)
        if criterion.seeded:
            options["seed"] = derived_seed(recipe.seed, self.block, weight.name)
        if criterion.from_shadow:
            options["importance"] = importance
        if criterion.solve is not None:
            target = Target(rule.sparsity, rule.pattern, rule.scope or (criterion.scopes or ("row",))[0])
            keep, values = criterion.solve(matrix, statistics, target, None, **options)
            if recipe.refine != "none":
                keep = self._refined(matrix, keep, statistics, rule)
                if criterion.exact or not recipe.solve:  # else the values would be thrown away
                    keep, values = criterion.solve(matrix, statistics, target, keep, **options)
            return keep, values if criterion.exact else self._solved(matrix, keep, statistics, values)
        keep = _mask(matrix, statistics, rule, name, options)
        if few:
            return keep, None
        keep = self._refined(matrix, keep, statistics, rule, name, options)
        return keep, self._solved(matrix, keep, statistics, None)

    def _solved(
        self, matrix: Tensor, keep: Tensor, statistics: InputStatistics, values: Tensor | None
    ) -> Tensor | None:
        """The best values for the mask where the recipe wants them, else those that there are."""
        gram = statistics.gram
        if not self.recipe.solve or gram is None:
            return values
        return solve(matrix, keep, gram, cross=statistics.cross)

    def _refined(
        self,
        matrix: Tensor,
        keep: Tensor,
        statistics: InputStatistics,
        rule: LayerRule,
        name: str = "wanda",
        options: dict[str, Any] | None = None,
    ) -> Tensor:
        """The mask after the recipe's refinement, with as many weights kept in each row, or group, as before."""
        refinement = find_refinement(self.recipe.refine)
        if refinement is None:
            return keep

        def scores() -> Tensor | None:
            return None if name == "wanda" else score(name, matrix, statistics, **(options or {}))

        return refinement(matrix, keep, statistics, rule.pattern, scores)


def _mask(matrix: Tensor, statistics: InputStatistics, rule: LayerRule, name: str, options: dict[str, Any]) -> Tensor:
    """The lowest scores of each row, group, or of the whole matrix go; or those that are below the threshold."""
    if rule.threshold is not None:
        return keep_mask(score(name, matrix, statistics, **options), threshold=rule.threshold)
    if rule.pattern is None and rule.scope == "matrix":
        return keep_mask(score(name, matrix, statistics, **options), rule.sparsity, scope="matrix")
    keep = torch.empty(matrix.shape, dtype=torch.bool, device=matrix.device)
    for rows, scores in score_rows(name, matrix, statistics, **options):
        keep[rows] = keep_mask(scores, rule.sparsity, rule.pattern)
    return keep
