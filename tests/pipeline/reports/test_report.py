"""report.md says what the run did, block by block, and its pictures show it."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.image import imread

from espalier.pipeline.config.options import build_config
from espalier.pipeline.config.prune import PruneConfig
from espalier.pipeline.record.metric_names import total_metrics
from espalier.pipeline.reports.figures import in_lanes
from espalier.pipeline.reports.format import duration, nats, number, size
from espalier.pipeline.reports.prune import write_report


def unit(name: str, before: float, after: float, improved: bool = True) -> dict[str, Any]:
    return {
        "name": name, "error_before": before, "error_after": after, "steps": 56, "learning_rate": 1e-3,
        "improved": improved, "seconds": 1.0,
    }  # fmt: skip


def a_block(index: int, shard: int) -> dict[str, Any]:
    return {
        "block": index,
        "shard": shard,
        "sparsity": 0.5,
        "seconds": {"mask": 0.1, "reconstruct": 2.1, "commit": 0.05},
        "tokens_per_second": 12345.6,
        "gflops": 310.2,
        "peak_memory": 410_000_000,
        "units": [unit("self_attn", 0.11 + index / 100, 0.021), unit("mlp", 0.2, 0.2, improved=index != 1)],
        "layers": {"self_attn.q_proj": {"zeros": 50, "weights": 100}},
        "file": f"model-block-{index:05d}.safetensors",
        "digest": "sha256:00",
    }


def a_run() -> dict[str, Any]:
    spans = [
        {"shard": shard, "phase": phase, "block": block, "start": start + shard, "end": end + shard}
        for shard in range(2)
        for phase, block, start, end in (("stream", None, 0.5, 2.5), ("mask", 2 * shard, 2.5, 3.0))
    ]
    parts = {"weights": 10_000_000, "spool_memory": 5_000_000, "spool_disk": 0, "training": 3_000_000}
    return {
        "run_id": "r1",
        "command": "prune",
        "model": {
            "path": "models/tiny",
            "family": "llama",
            "blocks": 4,
            "parameters": 5_123_456,
            "prunable": 4_000_000,
        },
        "config": {"criterion": "wanda", "sparsity": 0.5, "pattern": None, "reconstruct": "component", "seed": 0},
        "output": "out/tiny-50",
        "sparsity": 0.5,
        "dense_perplexity": 3.63,
        "perplexity": 6.2,
        "seconds": {"tokens": 0.2, "stream": 4.0, "work": 12.0, "total": 21.7},
        "peak_memory": {"driver": 620_000_000, "shards": [900_000_000, 910_000_000]},
        "estimate": {"driver": 700_000_000, "shards": [parts | {"peak": 1_000_000_000}] * 2},
        "shards": [
            {"index": index, "first": 2 * index, "last": 2 * index + 1, "node": "node-1", "device": "cpu"}
            for index in range(2)
        ],
        "blocks": [a_block(index, index // 2) for index in range(4)],
        "timeline": spans,
        "versions": {"torch": "2.13.0"},
        "warnings": ["the tracker | was away"],
        "compute": "bf16",
        "mlflow_run_id": None,
        "tracking_uri": "sqlite:///mlflow.db",
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Path]]:
    """The text of the report of `a_run`, and the paths that were written."""
    paths = write_report(a_run(), tmp_path_factory.mktemp("report"))
    return paths[0].read_text(), paths


def block_rows(text: str) -> dict[int, str]:
    table = text.split("## Blocks")[1].split("## Load it")[0]
    return {int(row[1]): row[0] for row in re.finditer(r"^\| (\d+) \| .*$", table, re.MULTILINE)}


def test_the_report_says_what_was_computed_in(written: tuple[str, list[Path]]) -> None:
    assert ", computed in bf16, on 2 shards, in 21.7 s" in written[0]


def test_report_has_every_block_with_its_errors(written: tuple[str, list[Path]]) -> None:
    rows = block_rows(written[0])
    assert list(rows) == [0, 1, 2, 3]
    assert "0.13 → 0.021" in rows[2]
    assert "*kept*" in rows[1] and "*kept*" not in rows[2]
    assert all("410 MB" in row and "310.2" in row for row in rows.values())


def test_report_holds_no_number_that_is_not_finite_and_no_none(written: tuple[str, list[Path]]) -> None:
    text = written[0]
    assert not re.search(r"\b(nan|inf|None)\b", text)
    assert "3.63" in text and "6.20" in text and nats(math.log(6.2)) in text
    assert "200 of 400" in text  # zeros, summed over the layers


def test_memory_is_shown_against_its_estimate(written: tuple[str, list[Path]]) -> None:
    text = written[0]
    assert "| shard 1 | 1 GB | 910 MB | 0.91 | weights 10 MB, reconstruction 3 MB, activations 5 MB |" in text
    assert "| driver | 700 MB | 620 MB | 0.89 |" in text


def test_pictures_are_valid_and_not_blank_and_named_in_the_report(written: tuple[str, list[Path]]) -> None:
    text, paths = written
    assert [path.name for path in paths] == ["report.md", "errors.png", "timeline.png"]
    for path in paths[1:]:
        pixels = imread(path)[..., :3]
        assert pixels.shape[0] > 200 and pixels.shape[1] > 800
        assert 0.005 < (pixels.min(axis=2) < 0.9).mean() < 0.9  # neither blank nor a solid colour
        assert f"]({path.name})" in text


def test_the_recipe_in_the_report_is_the_config(written: tuple[str, list[Path]]) -> None:
    text = written[0]
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe == {"criterion": "wanda", "sparsity": 0.5, "reconstruct": "component", "seed": 0}
    assert "espalier prune models/tiny --output NEW_DIRECTORY --config recipe.yaml" in text


def test_the_recipe_of_a_python_run_with_a_pattern_can_be_given_back(tmp_path: Path) -> None:
    run = a_run()
    run["config"] = PruneConfig(
        model="models/tiny", output="out", calibration=[[1, 2, 3]] * 1000, pattern="2:4"
    ).model_dump()
    text = write_report(run, tmp_path)[0].read_text()
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    config = build_config(recipe | {"model": "models/tiny", "output": "out"}, PruneConfig)
    assert config.pattern == "2:4"
    assert config.spool_memory == run["config"]["spool_memory"]
    assert config.calibration == "CALIBRATION_TEXT"


def test_a_run_without_reconstruction_or_evaluation_has_a_report_without_errors(tmp_path: Path) -> None:
    run = a_run()
    run["config"]["reconstruct"] = "none"
    run["dense_perplexity"] = run["perplexity"] = None
    for block in run["blocks"]:
        block["units"] = []
    paths = write_report(run, tmp_path)
    assert [path.name for path in paths] == ["report.md", "timeline.png"]
    text = paths[0].read_text()
    assert list(block_rows(text)) == [0, 1, 2, 3]
    assert "errors.png" not in text and "no errors were measured" in text
    assert "| perplexity | – | – |" in text


def test_errors_of_zero_and_of_infinity_can_be_drawn(tmp_path: Path) -> None:
    strange = a_run()
    strange["blocks"][0]["units"] = [unit("self_attn", 0.0, 0.0), unit("mlp", math.inf, 0.1)]
    assert (tmp_path / "errors.png") in write_report(strange, tmp_path)


def test_spans_that_overlap_lie_in_different_lanes() -> None:
    spans = [{"start": 0.0, "end": 2.0}, {"start": 1.0, "end": 3.0}, {"start": 2.0, "end": 4.0}]
    assert [(lane, lanes) for _, lane, lanes in in_lanes(list(spans))] == [(0, 2), (1, 2), (0, 2)]


def test_quantities_read_well() -> None:
    assert [duration(value) for value in (0.25, 21.72, 126, 3780, 7380)] == [
        "0.25 s", "21.7 s", "2.1 min", "63.0 min", "2 h 03 min",
    ]  # fmt: skip
    assert [size(value) for value in (None, 512, 410e6, 1.25e9)] == ["–", "512 B", "410 MB", "1.25 GB"]
    assert [number(value) for value in (None, 6.2, 12345.6, 1e-7)] == ["–", "6.2", "12,346", "1.000e-07"]


def test_energy_and_operations_stand_beside_each_phase_and_what_was_not_measured_is_said(tmp_path: Path) -> None:
    run = a_run()
    write_report(run, tmp_path)
    assert (
        "| work | blocks scored, masked, reconstructed, written | 12.0 s | not measured |  |"
        in (tmp_path / "report.md").read_text()
    )
    run |= {"energy": {"work": {"cpu": 1234.0, "gpu": None}}, "flops": {"work": 5.6e12}}
    write_report(run, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| work | blocks scored, masked, reconstructed, written | 12.0 s | CPU 1.23 kJ | 5.6 TFLOP |" in text
    assert total_metrics(run) | {"joules/work/cpu": 1234.0, "flops/work": 5.6e12} == total_metrics(run)
