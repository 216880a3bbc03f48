"""The parts of a tracking experiment: training with a shadow, then for each threshold pruning and fine-tuning.

Each part is a finished directory or is made again, so an interrupted experiment goes on from what is there.
"""

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from espalier.cluster.connection.connect import connect
from espalier.cluster.connection.room import has_room
from espalier.cluster.rank_group import RankGroup
from espalier.pipeline.config.options import build_config
from espalier.pipeline.config.prune import PruneConfig
from espalier.pipeline.config.retrain import RetrainConfig
from espalier.pipeline.config.track import TrackConfig
from espalier.pipeline.planning.hardware import cores
from espalier.pipeline.planning.model_info import model_facts
from espalier.pipeline.pruning import prune as driver
from espalier.pipeline.record.metric_names import cost_metrics, named
from espalier.pipeline.record.recorder import Recorder, recorded_run
from espalier.pipeline.record.run_record import (
    Cost,
    PruneRecord,
    RetrainRecord,
    RunRecord,
    TrackPoint,
    TrackRecord,
    TunedPoint,
)
from espalier.pipeline.reports.format import percent, target_share
from espalier.pipeline.reports.track import write_report
from espalier.pipeline.retraining import run as retrain
from espalier.pipeline.run.directory import RunDirectory, disk_full_refused, recorded
from espalier.pipeline.run.new_family import tried
from espalier.pipeline.run.progress import Reporter, reporter_for
from espalier.pipeline.run.stopping import at_the_last
from espalier.pipeline.weight_tracking.cost import cost_of, cost_of_tracking, summed
from espalier.pipeline.weight_tracking.data import ExperimentData, prepare
from espalier.stages.errors import Refusal
from espalier.stages.loading.skeleton import read_config
from espalier.stages.masks import thresholds_for_sparsity
from espalier.stages.metrics.perplexity import perplexity_of
from espalier.stages.storage.hf_checkpoint import Checkpoint, resolve

STORE_BYTES = 256 << 20  # of Ray's object store: a prune of one window passes through it
SHARED = (  # what an experiment and its training runs are asked for under one name
    *("batch", "microbatch", "length", "bos", "schedule", "weight_decay", "beta2", "clip", "seed"),
    *("zero_stage", "offload", "dtype", "experiment"),
)
TRAINING = ("steps", "learning_rate", "warmup", "eval_every", "checkpoint_every")
SHADOW = ("shadow_schedule", "shadow_decay", "shadow_signed", "shadow_dtype", "shadow_every")
RECORD_SECONDS = 60.0  # that a run waits, at most, to be told its parent's name in MLflow


def finished_run(output: Path) -> RunRecord | None:
    """The run.json in `output` if that run is finished."""
    run = recorded(output)
    return run if run is not None and run["status"] == "finished" else None


def _stage(output: Path, begin: Callable[[], Any], go_on: Callable[[], Any]) -> RunRecord:
    """The run.json of the part of an experiment in `output`: as it is, gone on with, or begun."""
    run = recorded(output)
    if run is None:
        shutil.rmtree(output, ignore_errors=True)  # made by a call that was killed before it wrote anything down
        begin()
    elif run["status"] != "finished":
        go_on()
    finished = finished_run(output)
    assert finished is not None
    return finished


def _cost_of_points(points: Sequence[TrackPoint]) -> dict[str, Cost]:
    kinds = dict.fromkeys(kind for point in points for kind in point["cost"])
    return {kind: summed(point["cost"][kind] for point in points if kind in point["cost"]) for kind in kinds}


def _figures(point: TunedPoint) -> dict[str, float]:
    """Of a point, what is drawn and recorded."""
    return {name: point[name] for name in ("rate", "sparsity", "pruned", "tuned")}


def _log(perplexity: float | None) -> float | None:
    return None if perplexity is None else math.log(perplexity)


class Experiment:
    """One experiment from data to report. `run` grows into run.json."""

    material: ExperimentData
    recorder: Recorder
    ranks: RankGroup

    def __init__(
        self,
        config: TrackConfig,
        directory: RunDirectory,
        run: TrackRecord,
        reporter: Reporter | None,
        ranks: RankGroup | None,
    ) -> None:
        self.config, self.directory, self.run, self.given = config, directory, run, ranks
        self.reporter = reporter or reporter_for(Console(stderr=True))
        self.output = directory.output
        self.started = time.time()
        self.shard_threads = config.threads

    def go(self) -> None:
        """The whole experiment. On any failure the directory stays as the next call wants it."""
        with ExitStack() as held:
            held.enter_context(disk_full_refused(self.output))
            held.callback(self.reporter.close)
            self.material = prepare(self.config, self.directory.home)
            for line in tried(read_config(resolve(self.material.model))):  # to be pruned, so before it is trained
                self.reporter.note(f"warning: {line}")
            self.recorder = self._recorder()
            held.enter_context(at_the_last(self.recorder.cut_short))
            try:
                with ExitStack() as connection:
                    self.ranks = self.given or self._ranks(connection)
                    points = self._sweep()
                self._finish(points)
            except BaseException as failure:
                self.recorder.abandon(failure)
                raise

    def _ranks(self, held: ExitStack) -> RankGroup:
        """Ranks of its own on a connected cluster, where one shard fits beside them for the pruning."""
        import torch

        config = self.config
        gpus = torch.cuda.device_count() if config.device in ("auto", "cuda") else 0
        if config.device == "cuda" and not gpus:
            raise Refusal("device cuda: this machine has no GPU; leave --device out, or give cpu")
        room = gpus or max(1, cores() // config.threads)
        # `auto` takes as many as the batch can be divided among.
        count = max(n for n in range(1, room + 1) if config.batch % n == 0) if config.ranks == "auto" else config.ranks
        if gpus and config.address is None:  # the processor has nothing else to do while a shard prunes and evaluates
            self.shard_threads = cores()
        cpus = count * config.threads + self.shard_threads
        held.enter_context(
            connect(config.address, cpus=cpus, gpus=count if gpus else 0, object_store_bytes=STORE_BYTES)
        )
        device = "cuda" if gpus else "cpu"
        return held.enter_context(RankGroup(count, threads=config.threads, device=device, on_event=self.reporter.note))

    # -- training, pruning, fine-tuning --------------------------------------------------------------------------------

    def _sweep(self) -> list[TrackPoint]:
        trained = self._trained()
        done = {entry["target"]: cast(TrackPoint, entry) for entry in self.directory.noted("point")}
        points = []
        for index, (target, rate) in enumerate(self._rates(trained)):
            point = done.get(target)
            if point is None:
                point = self._point(target, rate, trained)
                curve = {f"curve/{name}": value for name, value in _figures(point).items()}
                self.recorder.metrics(named(curve), step=index)
            points.append(point)
        return points

    def _trained(self) -> Path:
        """Where the dense model is, trained and tracked."""
        output, config = self.output / "trained", self.config
        own = {name: getattr(config, name) for name in (*TRAINING, *SHADOW)}
        own |= {"shadow": True, "shadow_window": config.window}
        parent = self.recorder.wait_for_run_id(RECORD_SECONDS)
        run = self._train(output, self.material.model, "training", parent, own)
        if "trained" not in self.run:
            self.run |= {"trained": self._measured(output, run["loss"]), "metric": self.material.metric}
            self.run |= {"model": run["model"], "ranks": run["ranks"]}
            self.run["cost"] = {"dense training": cost_of(run, without="track"), "tracking": cost_of_tracking(run)}
            self.directory.write(self.run)
        return output

    def _rates(self, trained: Path) -> list[tuple[float, float]]:
        """(what was asked for, the threshold that does it) for each point."""
        config = self.config
        if config.rates is not None:
            return [(rate, rate) for rate in config.rates]
        assert config.sparsities is not None
        shadow = Checkpoint(trained / "shadow")
        facts = model_facts(read_config(trained), str(trained), config.dtype, Checkpoint(trained))
        scores = (shadow.load([name])[name] for name, _, _ in facts.linears)
        return list(zip(config.sparsities, thresholds_for_sparsity(scores, config.sparsities), strict=True))

    def _point(self, target: float, rate: float, trained: Path) -> TrackPoint:
        """Prune at one threshold and fine-tune; noted once it is done. At 0 all is kept, and fine-tuned as well."""
        title = f"rate {target:g}" if self.config.rates is not None else f"sparsity {target_share(target)}"
        home = self.output / title.replace(" %", "").replace(" ", "-")
        recorder = self._point_recorder(title, rate, home)
        try:
            tuned = self._pruned_and_tuned(title, rate, trained, home, recorder.wait_for_run_id(RECORD_SECONDS))
        except BaseException as failure:
            recorder.abandon(failure)
            raise
        recorder.metrics(named(_figures(tuned)))
        recorder.metrics(named({"seconds/{phase}": tuned["seconds"]}, phase="total"))
        if self.material.measure is None:
            losses = {"perplexity": tuned["tuned"], "dense_perplexity": self.run["trained"]}
            recorder.metrics(named({name: perplexity_of(loss) for name, loss in losses.items()}))
        recorder.close()
        point: TrackPoint = {**tuned, "target": target, "mlflow_run_id": recorder.run_id}
        self.directory.note("point", **point)
        self.reporter.note(
            f"{title}: rate {rate:.3f}, {percent(point['sparsity'])} zeros, {self.material.metric} "
            f"{point['pruned']:.4f} -> {point['tuned']:.4f}"
        )
        return point

    def _pruned_and_tuned(self, title: str, rate: float, trained: Path, home: Path, parent: str | None) -> TunedPoint:
        """One point of the curve, all but what it is called."""
        started, steps = time.perf_counter(), self._finetune_steps
        pruned = self._pruned(home / "pruned", trained, rate, title, parent) if rate > 0 else None
        source = home / "pruned" if pruned else trained
        own = {
            "steps": steps,
            "learning_rate": self.config.finetune_learning_rate,
            "warmup": min(self.config.warmup, steps // 10),
            "masked": True,
        }
        tuned = self._train(home / "tuned", str(source), f"{title}: fine-tuning", parent, own)
        cost = ({"pruning": cost_of(pruned)} if pruned else {}) | {"fine-tuning": cost_of(tuned)}
        return {
            "rate": rate,
            "sparsity": pruned["sparsity"] if pruned else 0.0,
            "pruned": self._measured(source, _log(pruned["perplexity"])) if pruned else self.run["trained"],
            "tuned": self._measured(home / "tuned", tuned["loss"]),
            "steps": steps,
            "seconds": time.perf_counter() - started,
            "checkpoint": str(home / "tuned"),
            "cost": cost,
        }

    @property
    def _finetune_steps(self) -> int:
        config = self.config
        if config.finetune_steps is not None:
            return config.finetune_steps
        assert config.finetune_epochs is not None
        return max(1, round(config.finetune_epochs * self.material.epoch / config.batch))

    def _pruned(self, output: Path, trained: Path, rate: float, title: str, parent: str | None) -> PruneRecord:
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
            "bos": self.config.bos,
            "shards": 1,
            "threads": self.shard_threads,
            "device": "cpu",  # the GPUs, if there are any, are the ranks'
            "seed": self.config.seed,
            "experiment": self.config.experiment,
            "run_name": f"{title}: pruning",
            "parent_run": parent,
        }
        config = build_config(request, PruneConfig)
        if not has_room({"CPU": float(self.shard_threads)}):
            self.ranks.release()  # it would wait for what they hold
        run = _stage(
            output, lambda: driver.prune(config, self.reporter), lambda: driver.resume(output, reporter=self.reporter)
        )
        return cast(PruneRecord, run)

    def _train(self, output: Path, model: str, title: str, parent: str | None, own: Mapping[str, Any]) -> RetrainRecord:
        """The run.json of one training run of the experiment, which says by `own` what is particular to it."""
        shared = {name: getattr(self.config, name) for name in SHARED}
        where = {"model": model, "output": str(output), "data": self.config.data}
        config = build_config(shared | where | {"run_name": title, "parent_run": parent} | dict(own), RetrainConfig)
        held: Any = {"reporter": self.reporter, "ranks": self.ranks, "sources": self.material.sources}
        run = _stage(output, lambda: retrain.retrain(config, **held), lambda: retrain.resume(output, **held))
        return cast(RetrainRecord, run)

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

    def _point_recorder(self, title: str, rate: float, home: Path) -> Recorder:
        """The record of one threshold, under names that `espalier compare` looks for."""
        done = {"criterion": f"temporal: {self.config.name}", "refine": f"{self._finetune_steps} steps of fine-tuning"}
        model = str(self.config.model) if isinstance(self.config.model, str) else self.config.model.get("model_type")
        return Recorder(
            experiment=self.config.experiment,
            run_name=title,
            params=done | {"rate": rate, "seed": self.config.seed, "model": model, "score": self.config.score},
            tags={"espalier.run_id": f"{self.run['run_id']}-{home.name}", "espalier.command": "track"},
            directory=home,
            run_id=recorded_run(home),
            parent=self.recorder.wait_for_run_id(RECORD_SECONDS),
        )

    def _finish(self, points: list[TrackPoint]) -> None:
        run, recorder = self.run, self.recorder
        run |= {
            "points": points,
            "cost": self.run["cost"] | _cost_of_points(points),
            "unit": self.material.unit,
            "beside": self.config.published | dict(self.material.beside),
            "seconds": time.time() - self.started,
            "tracking_uri": recorder.tracking_uri,
            "mlflow_run_id": recorder.wait_for_run_id(RECORD_SECONDS),
            "status": "finished",
        }
        run |= {"report": str(self.output / "report.md"), "picture": str(self.output / "curve.png")}
        best = min(points, key=lambda point: point["tuned"])
        recorder.metrics(
            named({"trained": run["trained"], "best": best["tuned"], "best_sparsity": best["sparsity"]})
            | named({"seconds/{phase}": run["seconds"]}, phase="total")
        )
        for kind, cost in run["cost"].items():
            recorder.metrics(cost_metrics(kind, cost))
        self.directory.write(run)
        for path in [self.directory.run_file, *write_report(run, self.output)]:
            recorder.artifact(path)
        recorder.close()
        if recorder.warning:
            self.reporter.note(f"warning: {recorder.warning}")
        self.directory.finish(run)
