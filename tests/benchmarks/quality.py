"""What each recipe is worth: perplexity and KL to the dense model, seconds and memory, over targets and seeds.

    python tests/benchmarks/quality.py [--model DIR] [--scratch DIR] [--limit 4]
    python tests/benchmarks/quality.py --table

Every run is an ordinary `prune` on two shards of one thread, whose processes serve one run after the other. It is
recorded in the MLflow experiment `quality` in SCRATCH/mlflow.db and, when it is finished, in one line of
SCRATCH/quality.jsonl. Runs that are there are not made again, so the whole can be stopped and gone on with; the most
telling ones come first. A seed decides which calibration windows are taken, and everything random. Defaults:
pystdlib-5m and its texts in a folder `shared` beside the repository; where that is missing, the bundled model,
calibrated and evaluated on the standard library's own sources.
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import ray
import trained_model
from trained_model import Quiet, commit, texts_for

from espalier import PruneConfig, prune
from espalier.cluster.connection.connect import local_cluster
from espalier.cluster.shard_actor import ShardWorker
from espalier.cluster.shard_group import ShardGroup
from espalier.pipeline.config.named_recipe import NAMES
from espalier.pipeline.pruning import run as prune_run
from espalier.stages.metrics.profile import release_memory

SHARDS, SEEDS = 2, (0, 1, 2)
TARGETS: dict[str, dict[str, Any]] = {
    "50 %": {"sparsity": 0.5},
    "60 %": {"sparsity": 0.6},
    "70 %": {"sparsity": 0.7},
    "2:4": {"pattern": "2:4"},
}


def _recipes() -> dict[str, dict[str, Any]]:
    """Name in the table -> options of `prune` beyond the target, in the table's order."""
    bare = {"refine": "none", "reconstruct": "none"}
    recipes: dict[str, dict[str, Any]] = {}
    for criterion in ("magnitude", "wanda", "owanda", "symwanda", "ria", "stochria", "lp-ria", "sparsegpt"):
        recipes[criterion] = bare | {"criterion": criterion}
    # Within a row ‖Y_i‖ is one number: per row, owanda would be magnitude.
    recipes["owanda"]["scope"] = "matrix"
    for criterion in ("magnitude", "wanda"):
        for refine in ("dsnot", "r2-dsnot", "swaps"):
            recipes[f"{criterion} + {refine}"] = bare | {"criterion": criterion, "refine": refine}
    for criterion in ("ria", "sparsegpt"):
        recipes[f"{criterion} + swaps"] = bare | {"criterion": criterion, "refine": "swaps"}
    for criterion in ("magnitude", "wanda", "ria", "sparsegpt"):
        recipes[f"{criterion} + component"] = {"criterion": criterion, "refine": "none", "reconstruct": "component"}
    best = {"criterion": "wanda", "refine": "swaps"}
    for unit in ("matrix", "component", "block", "window:2"):
        recipes[f"wanda + swaps + {unit}"] = best | {"reconstruct": unit}
    fitted = best | {"reconstruct": "component"}
    for epochs in (2, 3):
        recipes[f"wanda + swaps + component, {epochs} epochs"] = fitted | {"epochs": epochs}
    for sweeps in (1, 2):  # of one epoch each, after one of dense inputs
        name = f"wanda + swaps + component + {sweeps} sweep{'s' * (sweeps > 1)}: {sweeps + 1} epochs in all"
        recipes[name] = fitted | {"sweeps": sweeps}
    recipes["wanda + swaps + component, pruned inputs"] = fitted | {"inputs": "pruned"}
    for epochs in (2, 3):
        name = f"wanda + swaps + component, pruned inputs, {epochs} epochs"
        recipes[name] = fitted | {"inputs": "pruned", "epochs": epochs}
    for options in recipes.values():
        options["solve"] = "off"  # as the table's rows were read, and as the papers have them
    for name, more in {"alps": bare, "alps, pruned inputs": bare | {"inputs": "pruned"}}.items():
        recipes[name] = more | {"criterion": "alps"}
    reconstructed = {"criterion": "alps", "refine": "none", "epochs": 2}
    for unit in ("component", "block", "window:2"):
        recipes[f"alps + {unit}, 2 epochs"] = reconstructed | {"reconstruct": unit}
    recipes["alps + component + 1 sweep: 4 epochs in all"] = reconstructed | {"reconstruct": "component", "sweeps": 1}
    for options in recipes.values():
        options["targets"] = "plain"  # as the rows up to here were read
    for inputs in ("dense", "pruned"):
        name = "alps, corrected" + (", pruned inputs" if inputs == "pruned" else "")
        recipes[name] = bare | {"criterion": "alps", "targets": "corrected", "inputs": inputs}
    for name in NAMES:
        recipes[f"recipe {name}"] = {"recipe": name}
    return recipes


RECIPES = _recipes()
TELLING = (
    *(f"recipe {name}" for name in NAMES),
    *("magnitude", "wanda", "ria", "sparsegpt"),
    *("wanda + dsnot", "wanda + r2-dsnot", "wanda + swaps", "magnitude + swaps"),
    *("wanda + component", "magnitude + component", "wanda + swaps + matrix", "wanda + swaps + component"),
    *("wanda + swaps + component + 1 sweep: 2 epochs in all", "wanda + swaps + component, 2 epochs"),
    *("wanda + swaps + component, pruned inputs", "wanda + swaps + component, pruned inputs, 2 epochs"),
)
Job = tuple[str, str, int]  # recipe, target, seed


def jobs() -> list[Job]:
    """All of them, the most telling first, of those the usual ratios; and in each a seed after the other."""
    everything = [
        (recipe, target, seed)
        for recipe in RECIPES
        for target in TARGETS
        for seed in SEEDS
        if not ("scope" in RECIPES[recipe] and "pattern" in TARGETS[target])  # N:M compares within groups
    ]
    usual = list(TARGETS)[:2]
    return sorted(everything, key=lambda job: (job[0] not in TELLING, job[1] not in usual, job[2]))


class WarmWorker(ShardWorker):
    """A shard's process that takes up one run after the other: importing torch takes longer than most runs here."""

    def __init__(self) -> None:
        pass

    def take_up(self, *run: Any) -> None:
        self._shard = None
        gc.collect()
        release_memory()
        with contextlib.suppress(OSError):  # Linux: what this process held at most counts from here on
            Path("/proc/self/clear_refs").write_text("5")
        super().__init__(*run)


class WarmShardGroup(ShardGroup):
    """A group of shards whose actors outlive it."""

    workers: ClassVar[list[Any]] = []

    def _started(self, threads: int, run_file: str | None) -> list[Any]:
        while len(self.workers) < len(self.specs):
            self.workers.append(ray.remote(WarmWorker).options(num_cpus=threads).remote())
        actors = self.workers[: len(self.specs)]
        pairs = zip(actors, self.specs, strict=True)
        ray.get([actor.take_up.remote(spec, threads, run_file) for actor, spec in pairs])
        return actors

    def __exit__(self, *exception: object) -> None:
        pass


def run(job: Job, texts: tuple[Path, Path], settings: argparse.Namespace) -> dict[str, Any]:
    """One run's line of the record; its checkpoint is deleted."""
    recipe, target, seed = job
    with tempfile.TemporaryDirectory(dir=settings.scratch) as home:
        result = prune(
            PruneConfig(
                model=str(settings.model),
                output=f"{home}/out",
                calibration=str(texts[0]),
                eval=str(texts[1]),
                samples=settings.samples,
                length=settings.length,
                shards=SHARDS,
                seed=seed,
                experiment="quality",
                run_name=f"{recipe}, {target}, seed {seed}",
                **TARGETS[target],
                **RECIPES[recipe],
            ),
            Quiet(),
        )
    seconds = result.run["seconds"]
    return {
        "recipe": recipe,
        "target": target,
        "seed": seed,
        "perplexity": result.perplexity,
        "dense_perplexity": result.dense_perplexity,
        "kl": result.kl,
        "top1_agreement": result.top1_agreement,
        "sparsity": result.sparsity,
        "seconds": seconds.get("stream", 0.0) + seconds["work"],
        "seconds_in_all": seconds["total"],
        "peak_memory": max(result.run["peak_memory"]["shards"]),
        "put_back": sum(not unit["improved"] for block in result.run["blocks"] for unit in block["units"]),
        "mlflow_run_id": result.run["mlflow_run_id"],
        "commit": commit(),
    }


def read(record: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []


def make(settings: argparse.Namespace, record: Path) -> None:
    """Up to `limit` of the runs that the record lacks, on one Ray cluster."""
    done = {(line["recipe"], line["target"], line["seed"]) for line in read(record)}
    wanted = set(settings.only or RECIPES)
    todo = [job for job in jobs() if job not in done and job[0] in wanted and job[2] in settings.seeds]
    print(f"{len(done)} runs are done, {len(todo)} are to do")
    if not todo:
        return
    texts = texts_for(settings)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{settings.scratch / 'mlflow.db'}"
    prune_run.ShardGroup = WarmShardGroup  # type: ignore[misc]
    with local_cluster(cpus=SHARDS, object_store_bytes=256 << 20):
        made = 0
        for job in todo:
            if made == settings.limit:
                break
            started = time.perf_counter()
            try:
                line = run(job, texts, settings)
            except Exception as error:  # the others are none the worse for it; it is tried again the next time
                print(f"{', '.join(map(str, job))}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
                continue
            made += 1
            with record.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(
                f"{', '.join(map(str, job))}: perplexity {line['perplexity']:.3f}, KL {line['kl']:.4f}, "
                f"{time.perf_counter() - started:.1f} s",
                flush=True,
            )


def table(lines: Iterable[dict[str, Any]]) -> str:
    """Markdown: a row a recipe; for each target perplexity and KL, mean ± standard deviation over the seeds; seconds of
    stream and work, and the larger shard's peak memory, medians over all runs of the recipe."""
    lines = list(lines)
    dense = {f"{line['dense_perplexity']:.2f}" for line in lines}
    header = ["recipe", *(f"{target} {what}" for target in TARGETS for what in ("perplexity", "KL")), "s", "MB", "runs"]
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for recipe in RECIPES:
        of_recipe = [line for line in lines if line["recipe"] == recipe]
        if not of_recipe:
            continue
        cells = [recipe]
        for target in TARGETS:
            runs = [line for line in of_recipe if line["target"] == target]
            cells += [_mean(line["perplexity"] for line in runs), _mean((line["kl"] for line in runs), 3)]
        cells.append(f"{statistics.median(line['seconds'] for line in of_recipe):.1f}")
        cells.append(f"{statistics.median(line['peak_memory'] for line in of_recipe) / 1e6:.0f}")
        rows.append([*cells, str(len(of_recipe))])
    drawn = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"Dense perplexity {', '.join(sorted(dense))}.\n\n{drawn}"


def _mean(values: Iterable[float], places: int = 2) -> str:
    values = list(values)
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{places}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{places}f}{spread}"


def main() -> None:
    parser = trained_model.parser(__doc__, "espalier-quality")
    parser.add_argument("--limit", type=int, help="runs to finish before it ends; default: all")
    parser.add_argument("--only", action="append", metavar="RECIPE", help="may be given again")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and end")
    settings = trained_model.parsed(parser)
    record = settings.scratch / "quality.jsonl"
    if settings.table:
        print(table(read(record)))
    else:
        make(settings, record)


if __name__ == "__main__":
    main()
