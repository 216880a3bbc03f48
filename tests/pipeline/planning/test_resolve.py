"""What is said before a run that would remove nothing, and that nothing is said before any other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from espalier.pipeline.config.prune import PruneConfig
from espalier.pipeline.planning.model_info import ModelInfo, model_facts
from espalier.pipeline.planning.resolve import removes_nothing
from espalier.stages.loading.skeleton import read_config
from espalier.stages.storage.hf_checkpoint import Checkpoint

WANDA: dict[str, Any] = {"model": "m", "output": "o", "calibration": "c", "criterion": "wanda"}


@pytest.fixture
def facts(tiny_checkpoint: Callable[..., Path]) -> ModelInfo:
    """Of a Llama whose widest rows have 48 inputs (its MLP's), and whose largest matrix has 32 of them."""
    directory = tiny_checkpoint()
    return model_facts(read_config(directory), str(directory), "auto", Checkpoint(directory))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sparsity": 0}, "sparsity 0 removes no weight; give --sparsity above 0"),
        (
            {"sparsity": 0.02},
            "sparsity 0.02 removes no weight: of 48 that are compared it is less than one; give --sparsity 0.021 or "
            "more",
        ),
        (
            {"sparsity": 0.0006, "criterion": "magnitude", "scope": "matrix"},
            "sparsity 0.0006 removes no weight: of 1,536 that are compared it is less than one; give --sparsity 0.001 "
            "or more",
        ),
        ({"pattern": "4:4"}, "pattern 4:4 removes no weight; keep fewer than 4"),
        ({"sparsity": 0.5, "overrides": [{"match": "*", "dense": True}]}, "sparsity 0 removes no weight"),
    ],
)
def test_a_run_that_removes_nothing_says_so(facts: ModelInfo, given: dict[str, Any], said: str) -> None:
    line = removes_nothing(facts, PruneConfig(**WANDA | given, refine="none").block_recipe)
    assert line is not None and line.startswith(said) and "\n" not in line


@pytest.mark.parametrize(
    "given",
    [
        {"sparsity": 0.021},
        {"sparsity": 0.0007, "criterion": "magnitude", "scope": "matrix"},
        {"sparsity": 0.0001, "criterion": "sparsegpt"},
        {"pattern": "2:4"},
        {"threshold": 0.1},
        {"sparsity": 0, "overrides": [{"match": "1.mlp.down_proj", "sparsity": 0.5}]},
        {"sparsity": 0.5, "allocation": "owl"},
    ],
)
def test_a_run_that_removes_something_does_not(facts: ModelInfo, given: dict[str, Any]) -> None:
    assert removes_nothing(facts, PruneConfig(**WANDA | given, refine="none").block_recipe) is None
