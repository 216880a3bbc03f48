"""Recipes of `prune` by name: the options that `--recipe` stands for."""

from pathlib import Path
from typing import Any, Literal, get_args

from espalier.pipeline.config.options import read_yaml
from espalier.stages.errors import Refusal

RecipeName = Literal["fast", "balanced", "best"]
NAMES: tuple[RecipeName, ...] = get_args(RecipeName)
FOLDER = Path(__file__).parent / "recipes" / "prune"


def find_recipe(name: str) -> RecipeName:
    """The recipe of that name. Raises Refusal if there is none."""
    for known in NAMES:
        if name == known:
            return known
    raise Refusal(f"recipe {name!r} is unknown; choose {', '.join(NAMES)}, or give options in a file with --config")


def recipe_text(name: RecipeName) -> str:
    """The recipe as it is written: YAML, and what it is for."""
    return (FOLDER / f"{name}.yaml").read_text()


def recipe_options(name: str) -> dict[str, Any]:
    """The options that the recipe sets, by name; none for a name that is no recipe's, which others refuse."""
    return read_yaml(FOLDER / f"{name}.yaml") if name in NAMES else {}
