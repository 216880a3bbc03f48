"""Retraining against reconstruction: perplexity, seconds and memory at equal tokens, and at ten times as many.

    python tests/benchmarks/retrain.py [--model DIR] [--scratch DIR] [--zero-stage 1] [--rates 3e-5 1e-4 3e-4]

A model is pruned by Wanda at 50 % and 2:4; once left so, once reconstructed (component by component, one epoch, with
and without swaps before it), on two shards of one thread. Each bare pruned model is then retrained under ZeRO with its
zeros held, on two ranks of one thread, on as many tokens as reconstruction saw and on ten times as many, at each of the
learning rates (cosine, a tenth of the steps to warm up): the best of them is what the table shows, in favour of
retraining. Every run is one of the MLflow experiment `retrain` in SCRATCH/mlflow.db. Seconds are those of the work
itself: of streams and fitting, or of training steps; not of starting processes, evaluating and saving. Texts as in
quality.py.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import trained_model
from trained_model import Quiet, commit, texts_for

from espalier import PruneConfig, prune
from espalier.cluster.connection.connect import local_cluster
from espalier.cluster.rank_group import RankGroup
from espalier.pipeline.config.retrain import RetrainConfig
from espalier.pipeline.retraining.run import retrain

PROCESSES = 2
BATCH = 4  # windows in an optimizer step
TARGETS: dict[str, dict[str, Any]] = {"50 %": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}
RECIPES: dict[str, dict[str, Any]] = {
    "wanda": {"refine": "none", "reconstruct": "none"},
    "wanda + component": {"refine": "none", "reconstruct": "component"},
    "wanda + swaps + component": {"refine": "swaps", "reconstruct": "component"},
}
Row = dict[str, Any]


def pruned(recipe: str, target: str, settings: argparse.Namespace, texts: tuple[Path, Path], output: Path) -> Row:
    """One way of pruning; the checkpoint stays in `output`."""
    result = prune(
        PruneConfig(
            model=str(settings.model),
            output=str(output),
            calibration=str(texts[0]),
            eval=str(texts[1]),
            samples=settings.samples,
            length=settings.length,
            shards=PROCESSES,
            experiment="retrain",
            run_name=f"{recipe}, {target}",
            **TARGETS[target],
            **RECIPES[recipe],
        ),
        Quiet(),
    )
    seconds, peaks = result.run["seconds"], result.run["peak_memory"]["shards"]
    tokens = settings.samples * settings.length
    return {
        "recipe": recipe,
        "target": target,
        "perplexity": result.perplexity,
        "dense": result.dense_perplexity,
        "tokens": tokens,
        "seconds": seconds.get("stream", 0.0) + seconds["work"],
        "peak_memory": max(peaks),
    }


def retrained(
    times: int,
    rate: float,
    target: str,
    settings: argparse.Namespace,
    texts: tuple[Path, Path],
    start: Path,
    output: Path,
    ranks: RankGroup,
) -> Row:
    """The pruned model `start`, trained on `times` as many tokens as it was calibrated on."""
    steps = times * settings.samples // BATCH
    result = retrain(
        RetrainConfig(
            model=str(start),
            output=str(output),
            data=str(texts[0]),
            eval=str(texts[1]),
            masked=True,
            steps=steps,
            batch=BATCH,
            length=settings.length,
            learning_rate=rate,
            warmup=steps // 10,
            zero_stage=settings.zero_stage,
            experiment="retrain",
            run_name=f"wanda, retrained on {times} x tokens at {rate:g}, {target}",
        ),
        Quiet(),
        ranks,
    )
    return {
        "recipe": f"wanda, retrained on {times} × tokens",
        "target": target,
        "perplexity": result.perplexity,
        "tokens": result.run["tokens"],
        "seconds": result.seconds,
        "peak_memory": max(result.run["peak_memory"]["ranks"]),
        "rate": rate,
    }


def measure(settings: argparse.Namespace) -> list[Row]:
    """All rows; prints each as it comes."""
    texts, rows = texts_for(settings), []

    def add(row: Row) -> None:
        rows.append(row)
        shown = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in row.items()}
        print(shown, flush=True)

    # The ranks hold their CPUs while the shards want theirs.
    cluster = local_cluster(cpus=2 * PROCESSES, object_store_bytes=256 << 20)
    with tempfile.TemporaryDirectory(dir=settings.scratch) as home, cluster:
        for index, target in enumerate(TARGETS):
            for recipe in RECIPES:
                add(pruned(recipe, target, settings, texts, Path(home) / f"{index} {recipe}"))
        with RankGroup(PROCESSES, on_event=print) as ranks:
            for index, target in enumerate(TARGETS):
                for times in (1, 10):
                    for rate in settings.rates:
                        output = Path(home) / f"{index} {times} {rate:g}"
                        start = Path(home) / f"{index} wanda"
                        add(retrained(times, rate, target, settings, texts, start, output, ranks))
    return rows


def table(rows: list[Row]) -> str:
    """Markdown: of retraining, the learning rate that came out best."""
    header = ["recipe", "tokens", *(f"{target} {what}" for target in TARGETS for what in ("perplexity", "s")), "MB"]
    drawn = [header, ["---", *["---:"] * (len(header) - 1)]]
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        cells, best = [], []
        for target in TARGETS:
            found = [row for row in rows if (row["recipe"], row["target"]) == (recipe, target)]
            best.append(min(found, key=lambda row: row["perplexity"]))
            rate = f" (rate {best[-1]['rate']:g})" if "rate" in best[-1] else ""
            cells += [f"{best[-1]['perplexity']:.2f}{rate}", f"{best[-1]['seconds']:.1f}"]
        peak = max(row["peak_memory"] for row in best) / 1e6
        drawn.append([recipe, f"{best[0]['tokens']:,}", *cells, f"{peak:.0f}"])
    dense = next(row["dense"] for row in rows if "dense" in row)
    lines = "\n".join(f"| {' | '.join(row)} |" for row in drawn)
    return f"Dense perplexity {dense:.2f}. Commit {commit()}.\n\n{lines}"


def main() -> None:
    parser = trained_model.parser(__doc__, "espalier-retrain")
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-5, 1e-4, 3e-4])
    settings = trained_model.parsed(parser)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{settings.scratch / 'mlflow.db'}"
    print(table(measure(settings)))


if __name__ == "__main__":
    main()
