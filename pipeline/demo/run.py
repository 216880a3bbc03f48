"""`espalier demo`: the bundled model pruned three ways on two shard actors, offline, and one table."""

import itertools
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from espalier.cluster.connection.connect import connect
from espalier.cluster.connection.folders import own_folder
from espalier.pipeline.config.prune import PruneConfig
from espalier.pipeline.demo.sources import write_texts
from espalier.pipeline.pruning.prune import prune
from espalier.pipeline.record.run_record import PruneRecord
from espalier.pipeline.run.directory import check_free
from espalier.pipeline.run.progress import reporter_for
from espalier.stages.storage.hf_checkpoint import resolve

MODEL = Path(__file__).parent / "model"
EXPERIMENT = "espalier-demo"
SAMPLES, LENGTH = 128, 256
CALIBRATION_BYTES, HELD_OUT_BYTES = 400_000, 100_000
RECIPES: dict[str, dict[str, Any]] = {
    "magnitude 50 %": {"recipe": "fast", "criterion": "magnitude"},
    "wanda 50 %": {"recipe": "fast"},
    "balanced 50 %": {"recipe": "balanced"},
}


def run_demo(output: Path | None = None, address: str | None = None) -> dict[str, Any]:
    """Prune the bundled model with each recipe. Keys: rows, recovered, checkpoint, report, experiment, tracking_uri.

    The model is copied to OUTPUT/dense first, where all nodes of a cluster find it: what Ray ships as code lies on each
    node by itself, and is unpacked anew under a running job when another node on the same machine asks for it.
    Without `output`, the first of demo-run, demo-run-2, ... that is not there yet. Raises Refusal if `output` is not
    new or empty.
    """
    output = output or next(path for path in _default_outputs() if not path.exists())
    check_free(output)
    resolve(str(MODEL))
    output = output.absolute()
    dense_model = shutil.copytree(MODEL, output / "dense")
    reporter = reporter_for(Console(stderr=True))
    rows: list[dict[str, Any]] = []
    try:
        with own_folder() as texts:
            calibration, held_out = write_texts(texts, CALIBRATION_BYTES, HELD_OUT_BYTES)
            with connect(address, cpus=2, object_store_bytes=256 << 20):
                for title, recipe in RECIPES.items():
                    reporter.note(f"\n{title}")
                    config = PruneConfig(
                        model=str(dense_model),
                        output=str(output / title.replace(" 50 %", "")),
                        calibration=str(calibration),
                        eval=str(held_out),
                        samples=SAMPLES,
                        length=LENGTH,
                        shards=2,
                        device="cpu",
                        experiment=EXPERIMENT,
                        run_name=title,
                        **recipe,
                    )
                    run = prune(config, reporter).run
                    if not rows:
                        rows.append(_row("dense", run, run["dense_perplexity"], 0.0, "evaluate_dense"))
                    rows.append(_row(title, run, run["perplexity"], run["sparsity"], "stream", "work", "assemble"))
    finally:
        reporter.close()
    dense, _, bare, balanced = (row["perplexity"] for row in rows)
    return {
        "rows": rows,
        "recovered": math.log(bare / balanced) / math.log(bare / dense),
        "checkpoint": os.path.relpath(run["output"]),
        "report": os.path.relpath(Path(run["output"]) / "espalier" / "report.md"),
        "experiment": EXPERIMENT,
        "tracking_uri": run["tracking_uri"],
    }


def _default_outputs() -> Iterator[Path]:
    yield Path("demo-run")
    yield from (Path(f"demo-run-{number}") for number in itertools.count(2))


def _row(recipe: str, run: PruneRecord, perplexity: float | None, sparsity: float, *phases: str) -> dict[str, Any]:
    return {
        "recipe": recipe,
        "perplexity": perplexity,
        "sparsity": sparsity,
        "seconds": sum(run["seconds"][phase] for phase in phases),
        "peak_memory": max(run["peak_memory"]["shards"]),
    }
