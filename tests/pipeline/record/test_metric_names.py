"""The table of metrics: all that is recorded is in it, and the README's index says the same."""

import ast
from pathlib import Path

import pytest

from espalier.pipeline.record.metric_names import METRICS, block_metrics, label, named, total_metrics

ROOT = Path(__file__).parents[3]
MAKERS = {
    "named",
    "block_metrics",
    "total_metrics",
    "cost_metrics",
}  # of metric_names: they take the table's names only


def test_the_readmes_index_is_the_table() -> None:
    """What fails here is mended by putting the lines that are told into the README."""
    readme = (ROOT / "pipeline" / "README.md").read_text()
    _, _, found = readme.partition("| metric | unit | step | meaning | computed in |\n|---|---|---|---|---|\n")
    shown = {part: part.upper() for part in ("unit", "phase", "source", "n")}
    rows = [
        f"| `{name.format(**shown)}` | {of.unit or '–'} | {of.step} | {of.meaning} | `{of.computed_in}` |"
        for name, of in METRICS.items()
    ]
    assert found.partition("\n\n")[0] == "\n".join(rows)


def test_a_metric_is_computed_in_a_file_that_is_there() -> None:
    assert [metric.computed_in for metric in METRICS.values() if not (ROOT / metric.computed_in).is_file()] == []


def test_all_that_is_recorded_is_named_by_the_table() -> None:
    recorded = []
    for path in (ROOT / "pipeline").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "metrics":
                recorded.append((path, node.args[0]))
    assert len(recorded) > 8
    for path, given in recorded:
        parts = [given.left, given.right] if isinstance(given, ast.BinOp) else [given]
        for part in parts:
            assert isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id in MAKERS, path


def test_a_name_that_is_not_in_the_table_is_not_recorded() -> None:
    with pytest.raises(KeyError, match="perplexities"):
        named({"perplexities": 1.0})
    assert named({"loss": None, "kl": 2}) == {"kl": 2.0}
    assert named({"peak_memory_mb/rank{n}": 3}, n=1) == {"peak_memory_mb/rank1": 3.0}


def test_what_a_report_calls_it_has_the_unit() -> None:
    assert label("kl") == "KL(dense ‖ pruned) (nats a token)"
    assert label("sparsity") == "zeros among the prunable weights"


def test_a_run_of_every_kind_is_told_by_name() -> None:
    run = {"loss": 1.5, "top1_agreement": 0.5, "flops": {"steps": 4}, "energy": {"train": {"cpu": 2.0, "gpu": None}}}
    assert total_metrics(run | {"peak_memory": {"driver": 1e6, "ranks": [2e6, 3e6]}}) == {
        "loss": 1.5,
        "top1_agreement": 0.5,
        "flops/steps": 4.0,
        "joules/train/cpu": 2.0,
        "peak_memory_mb/driver": 1.0,
        "peak_memory_mb/rank0": 2.0,
        "peak_memory_mb/rank1": 3.0,
    }
    unit = {"name": "mlp.experts.3.down_proj", "error_before": 0.5, "error_after": 0.25}
    assert block_metrics({"block": 0, "units": [unit]})["mlp.experts.3.down_proj/error_after"] == 0.25
