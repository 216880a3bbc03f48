"""`espalier track`: train while a shadow of the weights is kept, prune by it at a sweep of thresholds, fine-tune, and
draw loss against sparsity (arXiv 2502.17071, as one command).

OUTPUT/trained/              the dense model, its shadow beside it in trained/shadow
OUTPUT/sparsity-60.0/pruned  what a threshold left of it
OUTPUT/sparsity-60.0/tuned   the same, fine-tuned with its zeros fixed
OUTPUT/report.md, curve.png  and run.json in OUTPUT/espalier

Each of these is a finished directory or is made again, so an interrupted experiment goes on from what is there.
"""

import json
import math
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.connect import connect
from cluster.extensions import check_compiler
from cluster.ranks import Ranks
from pipeline import driver, retrain
from pipeline.config import PruneConfig, build_config
from pipeline.machine import cores
from pipeline.plan import ModelFacts, model_facts
from pipeline.progress import Reporter, reporter_for
from pipeline.retrain_config import RetrainConfig
from pipeline.rundir import RunDirectory, check_free, command_of, disk_full_refused
from pipeline.track_config import TrackConfig
from pipeline.track_data import Material, prepare
from pipeline.track_report import write_report
from pipeline.tracking import Recorder, recorded_run
from stages.checkpoint import Checkpoint
from stages.errors import Refusal
from stages.landing import landing_rates
from stages.skeleton import read_config
from stages.spec import HOME

STORE_BYTES = 256 << 20  # of Ray's object store: a prune of one window passes through it
SHARED = (  # what an experiment and its training runs are asked for under one name
    *("batch", "microbatch", "length", "schedule", "weight_decay", "beta2", "clip", "seed"),
    *("zero_stage", "offload", "dtype", "experiment"),
)
TRAINING = ("steps", "learning_rate", "warmup", "eval_every", "checkpoint_every")
SHADOW = ("shadow_schedule", "shadow_decay", "shadow_signed", "shadow_dtype", "shadow_every")
WHERE = {"ranks", "threads", "address", "run_name", "published"}  # what may be another when an experiment goes on
SUMMARY = ("output", "metric", "trained", "points", "seconds", "picture", "report", "mlflow_run_id", "tracking_uri")


@dataclass(frozen=True, slots=True)
class TrackResult:
    """What a finished experiment gave; `run` is all of run.json.

    Each of `points` has target (the rate or share asked for), rate, sparsity (share of zeros among prunable weights),
    pruned and tuned (the metric before and after fine-tuning), steps, seconds, checkpoint, and its parts' MLflow runs.
    """

    output: Path
    trained: float  # the metric after training, before anything is pruned
    points: list[dict[str, Any]]
    run: dict[str, Any]

    def summary(self) -> dict[str, Any]:
        """The object that `track --json` prints."""
        return {name: self.run[name] for name in SUMMARY}


def track(config: TrackConfig, reporter: Reporter | None = None, ranks: Ranks | None = None) -> TrackResult:
    """Run the experiment, or go on with the same one where it was interrupted.

    `ranks`: ranks that are running, to use one set for several experiments; else it starts its own. Raises Refusal for
    what cannot work, and for an output that holds something else.
    """
    config = _located(config)
    output = Path(config.output)
    if command_of(output) == "track" and _finished(output) is None:
        return resume(output, reporter, ranks, config)
    check_free(output)
    if ranks is None:
        check_compiler()
    run = {
        "run_id": uuid.uuid4().hex[:12],
        "command": "track",
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": config.model_dump(mode="json"),
        "fingerprint": None,
        "output": str(output),
    }
    directory = RunDirectory.claim(output, run)
    try:
        return _Run(config, directory, run, reporter, ranks).go()
    except Refusal:
        if not (output / "trained").exists():  # nothing to go on from: the same command may be given again
            directory.discard()
        raise
    finally:
        directory.release()


def resume(
    output: Path, reporter: Reporter | None = None, ranks: Ranks | None = None, config: TrackConfig | None = None
) -> TrackResult:
    """Go on with an interrupted experiment; `config`, if given, must be its own but for where it runs.

    Raises Refusal if there is none, if it is finished, or if it was asked for something else.
    """
    directory, run = RunDirectory.reopen(output.expanduser().absolute())
    try:
        recorded = build_config({k: v for k, v in run["config"].items() if v is not None}, TrackConfig)
        for name, was in recorded.model_dump().items():
            if config is not None and name not in WHERE and getattr(config, name) != was:
                raise Refusal(
                    f"{name.replace('_', '-')} {getattr(config, name)}: the experiment in {output} was begun with "
                    f"{was}; give that, or another --output"
                )
        return _Run(config or recorded, directory, run, reporter, ranks).go()
    finally:
        directory.release()


def _located(config: TrackConfig) -> TrackConfig:
    """`config` with its local paths absolute, so that it can be resumed from any directory."""
    paths: dict[str, Any] = {"output": str(Path(config.output).expanduser().absolute())}
    for name in ("data", "model"):
        value = getattr(config, name)
        if isinstance(value, str) and Path(value).expanduser().exists():
            paths[name] = str(Path(value).expanduser().absolute())
    return config.model_copy(update=paths)


def _recorded(output: Path) -> dict[str, Any] | None:
    """The run.json in `output`, if there is one."""
    try:
        run: dict[str, Any] = json.loads((output / HOME / "run.json").read_text())
    except (OSError, ValueError):
        return None
    return run


def _finished(output: Path) -> dict[str, Any] | None:
    run = _recorded(output)
    return run if run is not None and run.get("status") == "finished" else None


def _stage(output: Path, begin: Callable[[], Any], go_on: Callable[[], Any]) -> dict[str, Any]:
    """The run.json of the part of an experiment in `output`: as it is, gone on with, or begun."""
    run = _recorded(output)
    if run is None:
        shutil.rmtree(output, ignore_errors=True)  # made by a call that was killed before it wrote anything down
        begin()
    elif run["status"] != "finished":
        go_on()
    finished = _finished(output)
    assert finished is not None
    return finished


def _log(perplexity: float | None) -> float | None:
    return None if perplexity is None else math.log(perplexity)


class _Run:
    """One experiment from data to report. `run` grows into run.json."""

    material: Material
    recorder: Recorder
    ranks: Ranks

    def __init__(
        self,
        config: TrackConfig,
        directory: RunDirectory,
        run: dict[str, Any],
        reporter: Reporter | None,
        ranks: Ranks | None,
    ) -> None:
        self.config, self.directory, self.run, self.given = config, directory, run, ranks
        self.reporter = reporter or reporter_for(Console(stderr=True))
        self.output = directory.output
        self.started = time.time()

    def go(self) -> TrackResult:
        """The whole experiment. On any failure the directory stays as the next call wants it."""
        with ExitStack() as held:
            held.enter_context(disk_full_refused(self.output))
            held.callback(self.reporter.close)
            self.material = prepare(self.config, self.directory.home)
            self.recorder = self._recorder()
            try:
                self.ranks = self.given or self._ranks(held)
                points = self._sweep()
                self._finish(points)
            except BaseException as failure:
                interrupted = isinstance(failure, KeyboardInterrupt)
                self.recorder.close("KILLED" if interrupted else "FAILED", timeout_seconds=5)
                raise
        return TrackResult(self.output, self.run["trained"], points, self.run)

    def _ranks(self, held: ExitStack) -> Ranks:
        """Ranks of its own on a connected cluster, where one shard fits beside them for the pruning."""
        import torch

        config = self.config
        gpus = torch.cuda.device_count() if config.device in ("auto", "cuda") else 0
        room = gpus or max(1, cores() // config.threads)
        # `auto` takes as many as the batch can be divided among.
        count = max(n for n in range(1, room + 1) if config.batch % n == 0) if config.ranks == "auto" else config.ranks
        cpus = (count + 1) * config.threads
        held.enter_context(
            connect(config.address, cpus=cpus, gpus=count if gpus else 0, object_store_bytes=STORE_BYTES)
        )
        device = "cuda" if gpus else "cpu"
        return held.enter_context(
            Ranks(count, threads=config.threads, device=device, offload=config.offload, on_event=self.reporter.note)
        )

    # -- training, pruning, fine-tuning --------------------------------------------------------------------------------

    def _sweep(self) -> list[dict[str, Any]]:
        trained = self._trained()
        done = {entry["target"]: entry for entry in self.directory.noted("point")}
        points = []
        for index, (target, rate) in enumerate(self._rates(trained)):
            point = done.get(target) or self._point(target, rate, trained)
            points.append({name: value for name, value in point.items() if name != "event"})
            values = {name: point[name] for name in ("rate", "sparsity", "pruned", "tuned")}
            self.recorder.metrics({f"curve/{name}": value for name, value in values.items()}, step=index)
        return points

    def _trained(self) -> Path:
        """Where the dense model is, trained and tracked."""
        output, config = self.output / "trained", self.config
        request = self._training(
            output, self.material.model, "training", {name: getattr(config, name) for name in (*TRAINING, *SHADOW)}
        )
        request |= {"shadow": True, "shadow_window": config.window}
        run = self._train(output, request)
        self.run |= {"trained": self._measured(output, run["loss"]), "model": run["model"], "ranks": run["ranks"]}
        self.run["metric"] = self.material.metric
        self.directory.write(self.run)
        return output

    def _rates(self, trained: Path) -> list[tuple[float, float]]:
        """(what was asked for, the threshold that does it) for each point."""
        config = self.config
        if config.rates is not None:
            return [(rate, rate) for rate in config.rates]
        assert config.sparsities is not None
        shadow, facts = Checkpoint(trained / "shadow"), self._facts(trained)
        scores = (shadow.load([name])[name] for name, _, _ in facts.linears)
        return list(zip(config.sparsities, landing_rates(scores, config.sparsities), strict=True))

    def _facts(self, model: Path) -> ModelFacts:
        return model_facts(read_config(model), str(model), self.config.dtype, Checkpoint(model))

    def _point(self, target: float, rate: float, trained: Path) -> dict[str, Any]:
        """Prune at one threshold and fine-tune; noted once it is done. At 0 all is kept, and fine-tuned as well."""
        title = f"rate {target:g}" if self.config.rates is not None else f"sparsity {100 * target:g} %"
        home = self.output / title.replace(" %", "").replace(" ", "-")
        started = time.perf_counter()
        pruned = self._pruned(home / "pruned", trained, rate, title) if rate > 0 else None
        source = home / "pruned" if pruned else trained
        steps = self.config.finetune_steps
        if steps is None:
            steps = max(1, round((self.config.finetune_epochs or 1) * self.material.epoch / self.config.batch))
        tuned = self._train(
            home / "tuned",
            self._training(
                home / "tuned",
                str(source),
                f"{title}: fine-tuning",
                {
                    "steps": steps,
                    "learning_rate": self.config.finetune_learning_rate,
                    "warmup": min(self.config.warmup, steps // 10),
                    "masked": True,
                },
            ),
        )
        before = self._measured(source, _log(pruned["perplexity"])) if pruned else self.run["trained"]
        point = {
            "target": target,
            "rate": rate,
            "sparsity": pruned["sparsity"] if pruned else 0.0,
            "pruned": before,
            "tuned": self._measured(home / "tuned", tuned["loss"]),
            "steps": steps,
            "seconds": time.perf_counter() - started,
            "checkpoint": str(home / "tuned"),
            "mlflow_run_ids": [run["mlflow_run_id"] for run in (pruned, tuned) if run],
        }
        self.directory.note("point", **point)
        self.reporter.note(
            f"{title}: rate {rate:.3f}, {point['sparsity']:.2%} zeros, {self.material.metric} "
            f"{point['pruned']:.4f} -> {point['tuned']:.4f}"
        )
        return point

    def _pruned(self, output: Path, trained: Path, rate: float, title: str) -> dict[str, Any]:
        request = {
            "model": str(trained),
            "output": str(output),
            "calibration": self.material.calibration,
            "eval": self.material.evaluation,
            "criterion": "temporal",
            "shadow": str(trained / "shadow"),
            "threshold": rate,
            "refine": "none",
            "reconstruct": "none",
            "samples": 1,
            "length": self.config.length,
            "shards": 1,
            "device": "cpu",  # the GPUs, if there are any, are the ranks'
            "seed": self.config.seed,
            "experiment": self.config.experiment,
            "run_name": f"{title}: pruning",
            "parent_run": self.recorder.wait_for_run_id(5),
        }
        config = build_config(request, PruneConfig)
        return _stage(
            output, lambda: driver.prune(config, self.reporter), lambda: driver.resume(output, reporter=self.reporter)
        )

    def _training(self, output: Path, model: str, title: str, own: Mapping[str, Any]) -> dict[str, Any]:
        """What a training run of the experiment is asked for."""
        shared = {name: getattr(self.config, name) for name in SHARED}
        return {
            **shared,
            **own,
            "model": model,
            "output": str(output),
            "data": self.config.data,
            "run_name": title,
            "parent_run": self.recorder.wait_for_run_id(5),
        }

    def _train(self, output: Path, request: dict[str, Any]) -> dict[str, Any]:
        config = build_config(request, RetrainConfig)
        held: Any = {"reporter": self.reporter, "ranks": self.ranks, "sources": self.material.sources}
        return _stage(output, lambda: retrain.retrain(config, **held), lambda: retrain.resume(output, **held))

    def _measured(self, checkpoint: Path, loss: float | None) -> float:
        """The metric of a model: its loss, or what this kind of data measures."""
        if self.material.measure is None:
            assert loss is not None
            return loss
        return float(self.material.measure(checkpoint)[self.material.metric])

    # -- the record ----------------------------------------------------------------------------------------------------

    def _recorder(self) -> Recorder:
        config = self.config
        return Recorder(
            experiment=config.experiment,
            run_name=config.run_name or f"track {config.name}",
            params=config.model_dump(mode="json", exclude={"published"}),
            tags={"espalier.run_id": self.run["run_id"], "espalier.command": "track"},
            directory=self.directory.home,
            run_id=recorded_run(self.directory.home),
        )

    def _finish(self, points: list[dict[str, Any]]) -> None:
        run, recorder = self.run, self.recorder
        run |= {
            "points": points,
            "unit": self.material.unit,
            "beside": self.config.published | dict(self.material.beside),
            "seconds": time.time() - self.started,
            "tracking_uri": recorder.tracking_uri,
            "mlflow_run_id": recorder.wait_for_run_id(5),
            "status": "finished",
        }
        run |= {"report": str(self.output / "report.md"), "picture": str(self.output / "curve.png")}
        best = min(points, key=lambda point: point["tuned"])
        recorder.metrics({"trained": run["trained"], "best": best["tuned"], "best_sparsity": best["sparsity"]})
        recorder.metrics({"seconds/total": run["seconds"]})
        self.directory.write(run)
        for path in [self.directory.run_file, *write_report(run, self.output)]:
            recorder.artifact(path)
        recorder.close()
        if recorder.warning:
            self.reporter.note(f"warning: {recorder.warning}")
