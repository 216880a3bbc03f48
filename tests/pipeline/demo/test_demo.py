"""The demo, made small: three runs, one table, and what it needs is in the package."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from espalier.pipeline.cli.tables import demo_tables
from espalier.pipeline.demo import run as demo
from espalier.stages.errors import Refusal


def test_the_bundled_model_is_whole_and_small() -> None:
    files = [path for path in demo.MODEL.iterdir() if path.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) <= 12_000_000


def test_a_directory_that_is_not_empty_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(Refusal, match="not empty"):
        demo.run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_small_demo_prunes_three_ways_and_shows_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: str, one_cluster: None
) -> None:
    for name, value in {"SAMPLES": 8, "LENGTH": 64, "CALIBRATION_BYTES": 20_000, "HELD_OUT_BYTES": 4_000}.items():
        monkeypatch.setattr(demo, name, value)
    result: dict[str, Any] = demo.run_demo(tmp_path / "demo")
    recipes = [row["recipe"] for row in result["rows"]]
    assert recipes == ["dense", "magnitude 50 %", "wanda 50 %", "balanced 50 %"]
    dense, magnitude, wanda, balanced = result["rows"]
    assert dense["perplexity"] < balanced["perplexity"] < wanda["perplexity"] < magnitude["perplexity"]
    assert dense["sparsity"] == 0 and all(abs(row["sparsity"] - 0.5) < 1e-3 for row in (magnitude, wanda, balanced))
    assert all(row["seconds"] > 0 and row["peak_memory"] > 50e6 for row in result["rows"])
    assert 0 < result["recovered"] < 1
    assert result["checkpoint"] == "demo/balanced" and (tmp_path / result["report"]).is_file()
    assert (tmp_path / result["checkpoint"] / "model.safetensors.index.json").is_file()

    console = Console(width=160, record=True, file=io.StringIO())
    console.print(demo_tables(result))
    shown = console.export_text()
    assert all(recipe in shown for recipe in recipes) and "mlflow ui" in shown and result["checkpoint"] in shown
