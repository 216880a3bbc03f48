"""Recipes of `prune` by name: the options that `--recipe` stands for."""

from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from espalier.pipeline.config.options import read_yaml
from espalier.stages.errors import Refusal, unknown

RecipeName = Literal["fast", "balanced", "best"]
NAMES: tuple[RecipeName, ...] = get_args(RecipeName)
FOLDER = Path(__file__).parent / "recipes" / "prune"


def recipe_text(name: str) -> str:
    """The recipe as it is written: YAML, and what it is for. Raises Refusal if there is none of that name."""
    if name not in NAMES:
        raise Refusal(f"recipe {name!r} {unknown(name, NAMES)}; or give options in a file with --config")
    return (FOLDER / f"{name}.yaml").read_text()


@cache
def recipe_options(name: str) -> dict[str, Any]:
    """The options that the recipe sets, by name; none for a name that is no recipe's, which others refuse."""
    return read_yaml(FOLDER / f"{name}.yaml") if name in NAMES else {}
