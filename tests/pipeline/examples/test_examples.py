"""Every example runs, on a tiny model."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from whole_runs import LENGTH, MICROBATCH, SAMPLES

from espalier.pipeline.config.options import build_config, read_yaml
from espalier.pipeline.config.prune import PruneConfig
from espalier.pipeline.examples import continue_text, own_criterion, prune_and_compare
from espalier.pipeline.pruning.prune import prune

EXAMPLES = Path(own_criterion.__file__).parent
SMALL: dict[str, Any] = {"samples": SAMPLES, "length": LENGTH, "microbatch": MICROBATCH, "shards": 1}


def test_every_example_is_run_here() -> None:
    tried = Path(__file__).read_text()
    for file in EXAMPLES.iterdir():
        if file.suffix in (".py", ".yaml") and file.stem != "__init__":
            assert file.stem in tried, file


@pytest.mark.ray
def test_two_recipes_are_compared(
    tiny_model: Callable[..., Path], text: Path, held_out: Path, tmp_path: Path, one_cluster: None, recorded: str
) -> None:
    rows = prune_and_compare.main(str(tiny_model()), str(text), str(held_out), str(tmp_path / "out"), **SMALL)
    assert {row["run"] for row in rows} == {"magnitude", "wanda"}
    assert rows[0]["perplexity"] <= rows[1]["perplexity"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_criterion_of_ones_own_prunes_and_the_result_goes_on_with_a_text(
    tiny_model: Callable[..., Path], text: Path, tmp_path: Path, recorded: str
) -> None:
    (tmp_path / "own_criterion.py").write_text(Path(own_criterion.__file__).read_text())
    given = [str(tiny_model()), str(text), str(tmp_path / "out")]
    program = f"import own_criterion; own_criterion.main(*{given}, **{SMALL})"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert continue_text.main(given[-1], "abc", tokens=3).replace(" ", "").startswith("abc")


@pytest.mark.ray
@pytest.mark.parametrize("recipe", ["half", "two-of-four"])
def test_a_recipe_in_a_file_prunes(
    tiny_model: Callable[..., Path], text: Path, tmp_path: Path, one_cluster: None, recorded: str, recipe: str
) -> None:
    given = {"model": str(tiny_model()), "output": str(tmp_path / "out"), "calibration": str(text), **SMALL}
    result = prune(build_config(read_yaml(EXAMPLES / f"{recipe}.yaml") | given, PruneConfig))
    assert result.sparsity == 0.5 if recipe == "half" else 0.4 < result.sparsity < 0.5
