"""A configuration held against one model: what is `auto` is decided, what does not fit the model is refused."""

import math

from espalier.pipeline.config.prune import PruneConfig
from espalier.pipeline.planning.model_info import ModelInfo
from espalier.pipeline.planning.windows import window_length
from espalier.stages.criteria.scoring import find_criterion
from espalier.stages.errors import Refusal
from espalier.stages.layer_rules import LayerRule, check_matches
from espalier.stages.masks import check_divisible
from espalier.stages.recipe import Recipe
from espalier.stages.refine import REFINEMENTS


def resolve_auto(config: PruneConfig, facts: ModelInfo) -> PruneConfig:
    """The configuration with `refine: auto` decided for this model.

    A refinement is worth its time where reconstruction costs much more: `Refinement.auto_from` says from how many
    tokens for each channel of the widest input. Of several the last in the table is chosen. None where the criterion
    finds mask and values together: exchanged one by one, ALPS' masks become worse (tests/benchmarks/README.md).
    """
    if config.refine != "auto":
        return config
    widest = max(into for layers in facts.layers for _, _, into in layers)
    tokens = config.samples * window_length(facts, config.length)
    worth = ["none"]
    if config.reconstruct != "none" and not find_criterion(config.criterion).exact:
        starts = {name: each.auto_from for name, each in REFINEMENTS.items() if each.auto_from is not None}
        worth += [name for name, start in starts.items() if tokens >= start * widest]
    return config.model_copy(update={"refine": worth[-1]})


def check_recipe_fits(facts: ModelInfo, recipe: Recipe) -> None:
    """Raises Refusal for a window larger than the model, an override that matches no layer, criterion options that a
    layer's criterion does not take, rows that groups of M do not fill, and a threshold for SparseGPT, naming the first
    such layer; for a shadow that is missing, or that no criterion reads."""
    if recipe.blocks_per_unit > facts.blocks:
        raise Refusal(
            f"reconstruct {recipe.reconstruct}:{recipe.blocks_per_unit}: the model has {facts.blocks} blocks; give at "
            "most that many"
        )
    names = [(block, layer, into) for block, layers in enumerate(facts.layers) for layer, _, into in layers]
    check_matches(recipe.overrides, [f"{block}.{layer}" for block, layer, _ in names])
    for block, layer, into in names:
        rule = recipe.rule(block, layer, recipe.sparsity)
        if rule.pattern is not None:
            check_divisible(into, rule.pattern, f"block {block}, {layer}")
        if rule.threshold is not None and find_criterion(rule.criterion).solve is not None:
            raise Refusal(
                f"block {block}, {layer}: threshold {rule.threshold:g} with criterion {rule.criterion}, which needs "
                "to know how many go as it chooses; use --sparsity, or another criterion"
            )
        _check_scope(rule, f"block {block}, {layer}")
    _check_shadow(recipe)


def _check_scope(rule: LayerRule, where: str) -> None:
    if rule.scope is not None and rule.scope not in find_criterion(rule.criterion).scopes:
        raise Refusal(
            f"{where}: scope {rule.scope} with criterion {rule.criterion}, which chooses by itself among how many "
            "weights; leave --scope out"
        )


def removes_nothing(facts: ModelInfo, recipe: Recipe) -> str | None:
    """One line where no weight would go from any layer: the amount is 0, or less than one weight of any row."""
    if recipe.allocation == "owl" or recipe.threshold is not None:  # known only when the scores are
        return None
    most = 0.0  # weights, or parts of one, that the layer's smallest group would lose
    largest = 1
    for block, layers in enumerate(facts.layers):
        for layer, out, into in layers:
            rule = recipe.rule(block, layer, recipe.sparsity)
            if rule.threshold is not None or (rule.pattern is not None and rule.pattern[0] < rule.pattern[1]):
                return None
            criterion, share = find_criterion(rule.criterion), rule.sparsity or 0.0
            if not criterion.scopes and share:  # SparseGPT counts a weight more than the ratio
                return None
            scope = rule.scope or (criterion.scopes or ("row",))[0]
            group = into if scope == "row" else out * into
            most, largest = max(most, group * share), max(largest, group)
    if int(most):
        return None
    if recipe.pattern is not None:
        return f"pattern {recipe.pattern[0]}:{recipe.pattern[1]} removes no weight; keep fewer than {recipe.pattern[1]}"
    if not most:
        return "sparsity 0 removes no weight; give --sparsity above 0"
    least = math.ceil(1000 / largest) / 1000
    return (
        f"sparsity {recipe.sparsity:g} removes no weight: of {largest:,} that are compared it is less than one; give "
        f"--sparsity {least:g} or more"
    )


def _check_shadow(recipe: Recipe) -> None:
    if "importance" in recipe.needs and recipe.shadow is None:
        raise Refusal("criterion temporal: scores by a shadow; give --shadow DIR, the shadow/ that a training run left")
    if recipe.shadow is not None and "importance" not in recipe.needs:
        raise Refusal(f"shadow {recipe.shadow}: criterion {recipe.criterion} does not read it; temporal does")
