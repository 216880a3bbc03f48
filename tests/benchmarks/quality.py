"""What each recipe is worth: log-perplexity lost beside SparseGPT's, perplexity, KL, choices, seconds, memory.

    python tests/benchmarks/quality.py [--models pystdlib-5m stories260k bundled] [--scratch DIR] [--limit 4]
    python tests/benchmarks/quality.py --table

Every run is an ordinary `prune` in one shard of one thread, whose process serves one run after the other. When it is
finished it is a line of quality.jsonl beside this file. Runs that are there are not made again, so the whole can be
stopped and gone on with; the most telling ones come first. A seed decides which calibration windows are taken, and
everything random. Measured is on 64 k held-out tokens from all over the text: a loss of 0.02 nats a token is 0.002
uncertain on 16 k of them, 0.001 on these. Of the models two lie in a folder `shared` beside the repository, with their
texts; the bundled one is calibrated and evaluated on the standard library's own sources.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import ray
import torch
import trained_model
from choices import accuracy, questions_for
from torch import Tensor
from trained_model import ROOT, SHARED, Quiet, commit
from transformers import PreTrainedModel

from espalier import PruneConfig, load, prune
from espalier.cluster.connection.connect import local_cluster
from espalier.cluster.shard_actor import OPTIONS, ShardFacts, ShardWorker
from espalier.cluster.shard_group import ShardGroup
from espalier.pipeline.demo import sources
from espalier.pipeline.pruning import run as prune_run
from espalier.stages.metrics.perplexity import measure
from espalier.stages.metrics.profile import release_memory

RECORD = Path(__file__).with_name("quality.jsonl")
SEEDS, SAMPLES, LENGTH, WINDOWS = (0, 1, 2), 64, 256, 256
MODELS = {
    "pystdlib-5m": SHARED / "models" / "pystdlib-5m",
    "stories260k": SHARED / "models" / "stories260k",
    "bundled": ROOT / "pipeline" / "demo" / "model",
}
TARGETS: dict[str, dict[str, Any]] = {
    "50 %": {"sparsity": 0.5},
    "60 %": {"sparsity": 0.6},
    "70 %": {"sparsity": 0.7},
    "2:4": {"pattern": "2:4"},
    "4:8": {"pattern": "4:8"},
}
BASE = "sparsegpt"  # whose loss others' are shares of
_MASKS = {"refine": "none", "solve": "off", "targets": "plain", "reconstruct": "none"}
RECIPES: dict[str, dict[str, Any]] = {  # name in the table -> options of `prune` beyond the target, in its order
    "recipe fast (wanda)": {"recipe": "fast"},
    "wanda + swaps": _MASKS | {"criterion": "wanda", "refine": "swaps"},
    "sparsegpt": _MASKS | {"criterion": "sparsegpt", "inputs": "pruned"},  # as published: one block after the other
    "alps": _MASKS | {"criterion": "alps"},
    "alps, pruned inputs": _MASKS | {"criterion": "alps", "inputs": "pruned"},
    "alps, corrected": _MASKS | {"criterion": "alps", "targets": "auto"},
    "wanda, fitted as best": {"recipe": "best", "criterion": "wanda", "refine": "none"},
    "wanda + swaps, fitted as best": {"recipe": "best", "criterion": "wanda", "refine": "swaps"},
    "sparsegpt, fitted as best": {"recipe": "best", "criterion": "sparsegpt"},
    "wanda + swaps + component, 2 epochs, pruned inputs": _MASKS
    | {"criterion": "wanda", "refine": "swaps", "reconstruct": "component", "epochs": 2, "inputs": "pruned"},
    "recipe balanced": {"recipe": "balanced"},
    "recipe best": {"recipe": "best"},
    "recipe best, pruned inputs": {"recipe": "best", "inputs": "pruned"},
}
FIRST = ("recipe best", BASE)
NEXT = (
    *("recipe balanced", "recipe fast (wanda)", "recipe best, pruned inputs"),
    *("alps", "alps, pruned inputs", "alps, corrected"),
)
Job = tuple[str, str, str, int]  # model, recipe, target, seed


def jobs() -> list[Job]:
    """All of them, the most telling and the cheapest first; 4:8 and the bundled model last."""
    everything = [
        (model, recipe, target, seed)
        for model in MODELS
        for recipe in RECIPES
        for target in TARGETS
        for seed in SEEDS
        if (model, target) != ("stories260k", "4:8")  # its rows of 172 weights hold no whole groups of 8
    ]

    def rank(job: Job) -> tuple[int, int, int, bool]:
        model, recipe, target, seed = job
        tier = 0 if recipe in FIRST else 3 if recipe not in NEXT else 2 if seed else 1
        return 2 if model == "bundled" else target == "4:8", tier, seed, model != "stories260k"

    return sorted(everything, key=rank)


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

    def cpu_seconds(self) -> float:
        return time.process_time()


class WarmShardGroup(ShardGroup):
    """A group of one shard whose actor outlives it."""

    worker: ClassVar[Any] = None
    spent: ClassVar[list[float]] = []  # the shard's CPU seconds once its tensors were loaded, and at the end

    def _started(self, threads: int, run_file: str | None) -> list[Any]:
        kept = type(self)
        kept.worker = kept.worker or ray.remote(num_cpus=threads, **OPTIONS)(WarmWorker).remote()
        ray.get(kept.worker.take_up.remote(*self.specs, threads, run_file))
        return [kept.worker]

    def open(self) -> list[ShardFacts]:
        facts = super().open()
        self.spent[:] = [ray.get(self.worker.cpu_seconds.remote())]
        return facts

    def __exit__(self, *exception: object) -> None:
        self.spent.append(ray.get(self.worker.cpu_seconds.remote()))


class Subject:
    """A model with its texts, and what the dense one makes of them."""

    def __init__(self, name: str, scratch: Path) -> None:
        self.name, self.model, self.scratch = name, str(MODELS[name]), scratch / name
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.calibration, held_out = _texts(name, self.scratch)
        dense, tokenizer = load(self.model, dtype="float32")
        text = held_out.read_text()
        self.tokens = _windows(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]))
        self.dense = dense.get_output_embeddings(), _hidden(dense, self.tokens)
        with torch.no_grad():
            self.dense_perplexity = measure(*self.dense, self.tokens).perplexity
        self.questions = questions_for(tokenizer, text, "identifier")
        self.dense_choices = accuracy(dense, self.questions)

    def run(self, recipe: str, target: str, seed: int) -> dict[str, Any]:
        """One run's line of the record; its checkpoint is deleted."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as home:
            result = prune(
                PruneConfig(
                    model=self.model,
                    output=f"{home}/out",
                    calibration=str(self.calibration),
                    samples=SAMPLES,
                    length=LENGTH,
                    shards=1,
                    threads=1,
                    seed=seed,
                    experiment="quality",
                    run_name=f"{self.name}, {recipe}, {target}, seed {seed}",
                    **TARGETS[target],
                    **RECIPES[recipe],
                ),
                Quiet(),
            )
            pruned, _ = load(result.output, dtype="float32")
        choices = accuracy(pruned, self.questions)
        with torch.no_grad():
            hidden = _hidden(pruned, self.tokens)
            measures = measure(pruned.get_output_embeddings(), hidden, self.tokens, self.dense)
        begun, ended = WarmShardGroup.spent
        units = [unit for block in result.run["blocks"] for unit in block["units"]]
        seconds = result.run["seconds"]
        return {
            "model": self.name,
            "recipe": recipe,
            "target": target,
            "seed": seed,
            "perplexity": round(measures.perplexity, 5),
            "dense_perplexity": round(self.dense_perplexity, 5),
            "kl": round(measures.kl or 0.0, 5),
            "top1_agreement": round(measures.top1_agreement or 0.0, 5),
            "choice_accuracy": round(choices, 4),
            "dense_choice_accuracy": round(self.dense_choices, 4),
            "seconds": round(seconds.get("stream", 0.0) + seconds["work"], 2),
            "cpu_seconds": round(ended - begun, 2),
            "peak_memory": max(result.run["peak_memory"]["shards"]),
            "put_back": sum(not unit["improved"] for unit in units),
            "commit": commit(),
        }


def _texts(model: str, scratch: Path) -> tuple[Path, Path]:
    """Calibration and held-out text of a model."""
    if model == "bundled":
        calibration, held_out = scratch / "calibration.txt", scratch / "held-out.txt"
        calibration.write_text(sources.calibration_text())
        held_out.write_text(sources.held_out_text())
        return calibration, held_out
    name = {"pystdlib-5m": "pystdlib", "stories260k": "stories"}[model]
    return SHARED / "data" / f"{name}-calib.txt", SHARED / "data" / f"{name}-valid.txt"


def _windows(ids: Tensor) -> Tensor:
    """At most WINDOWS windows (S, LENGTH) of a text's tokens (T,), evenly spread: its first pages are few files."""
    whole = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return whole[:: max(1, len(whole) // WINDOWS)][:WINDOWS]


@torch.no_grad()
def _hidden(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """What the head reads of windows (S, T): (S, T, D)."""
    return torch.cat([model.base_model(batch).last_hidden_state for batch in tokens.split(8)])


def read(record: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []


def make(settings: argparse.Namespace) -> None:
    """Up to `limit` of the runs that the record lacks, on one Ray cluster."""
    done = {(line["model"], line["recipe"], line["target"], line["seed"]) for line in read(settings.record)}
    wanted = set(settings.only or RECIPES)
    todo = [job for job in jobs() if job not in done and job[0] in settings.models and job[1] in wanted]
    print(f"{len(done)} runs are done, {len(todo)} are to do", flush=True)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{settings.scratch / 'mlflow.db'}"
    prune_run.ShardGroup = WarmShardGroup  # type: ignore[misc]
    torch.set_num_threads(1)
    subjects: dict[str, Subject] = {}
    with local_cluster(cpus=1, object_store_bytes=256 << 20):
        for model, recipe, target, seed in todo[: settings.limit]:
            started = time.perf_counter()
            subject = subjects[model] = subjects.get(model) or Subject(model, settings.scratch)
            try:
                line = subject.run(recipe, target, seed)
            except Exception as error:  # the others are none the worse for it; it is tried again the next time
                why = str(error).strip().splitlines()[:1]
                print(f"{model}, {recipe}, {target}, seed {seed}: {type(error).__name__}: {why}", flush=True)
                continue
            with settings.record.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(
                f"{model}, {recipe}, {target}, seed {seed}: perplexity {line['perplexity']:.3f}, "
                f"KL {line['kl']:.4f}, choices {line['choice_accuracy']:.3f}, {time.perf_counter() - started:.1f} s",
                flush=True,
            )


def losses(lines: Iterable[dict[str, Any]]) -> dict[Job, float]:
    """Log-perplexity lost by each run, as a share of what BASE lost on the same model, target and seed."""
    lost = {
        (line["model"], line["recipe"], line["target"], line["seed"]): math.log(
            line["perplexity"] / line["dense_perplexity"]
        )
        for line in lines
    }
    return {
        (model, recipe, target, seed): loss / lost[model, BASE, target, seed]
        for (model, recipe, target, seed), loss in lost.items()
        if (model, BASE, target, seed) in lost
    }


def tables(lines: list[dict[str, Any]]) -> str:
    """Markdown: for each model the shares of BASE's loss, then what else was read."""
    drawn = []
    for model in MODELS:
        if of_model := [line for line in lines if line["model"] == model]:
            first = of_model[0]
            drawn.append(
                f"**{model}**: dense perplexity {first['dense_perplexity']:.2f}, choices "
                f"{first['dense_choice_accuracy']:.3f}\n\n{_shares(of_model)}\n\n{_readings(of_model)}"
            )
    return "\n\n".join(drawn)


def _shares(lines: list[dict[str, Any]]) -> str:
    """A row a recipe, a column a target: the share of BASE's loss, seed by seed and then its mean ± standard deviation;
    CPU seconds of the shard's stream and work, its peak memory: medians over all runs."""
    shares = losses(lines)
    rows = []
    for recipe in RECIPES:
        of_recipe = [line for line in lines if line["recipe"] == recipe]
        cells = [
            _mean([share for (_, name, to, _), share in shares.items() if (name, to) == (recipe, target)], 3)
            for target in TARGETS
        ]
        if of_recipe:
            rows.append([recipe, *cells, *_costs(of_recipe), str(len(of_recipe))])
    return _drawn([f"share of {BASE}'s loss", *TARGETS, "CPU s", "MB", "runs"], rows)


def _readings(lines: list[dict[str, Any]]) -> str:
    """A row a recipe, a column a target: perplexity / KL / top-1 agreement / choices, means over the seeds."""
    shown: tuple[tuple[str, int], ...] = (("perplexity", 2), ("kl", 3), ("top1_agreement", 3), ("choice_accuracy", 3))
    rows = []
    for recipe in RECIPES:
        cells = []
        for target in TARGETS:
            runs = [line for line in lines if (line["recipe"], line["target"]) == (recipe, target)]
            means = [f"{statistics.fmean(line[name] for line in runs):.{places}f}" for name, places in shown if runs]
            cells.append(" / ".join(means))
        if any(cells):
            rows.append([recipe, *cells])
    return _drawn(["perplexity / KL / top-1 / choices", *TARGETS], rows)


def _costs(lines: list[dict[str, Any]]) -> list[str]:
    seconds = statistics.median(line["cpu_seconds"] for line in lines)
    return [f"{seconds:.1f}", f"{statistics.median(line['peak_memory'] for line in lines) / 1e6:.0f}"]


def _mean(values: list[float], places: int) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{places}f}" if len(values) > 1 else " (one seed)"
    return f"{statistics.fmean(values):.{places}f}{spread}"


def _drawn(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=[name for name in MODELS if MODELS[name].exists()]
    )
    parser.add_argument("--only", action="append", metavar="RECIPE", choices=RECIPES, help="may be given again")
    parser.add_argument("--limit", type=int, help="runs to try before it ends; default: all")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "espalier-quality")
    parser.add_argument("--table", action="store_true", help="print the tables of what is there, and end")
    settings = trained_model.parsed(parser)
    if settings.table:
        print(tables(read(settings.record)))
    else:
        make(settings)


if __name__ == "__main__":
    main()
