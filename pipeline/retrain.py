"""A training run: tokens, ranks, what they tell, the record, and a plain checkpoint at the end."""

import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.connect import connect, nodes
from cluster.ranks import Ranks
from pipeline.assemble import copy_companions
from pipeline.evaluate import sparsity_of
from pipeline.facts import ModelFacts
from pipeline.inputs import Purpose, token_table
from pipeline.metrics import total_metrics
from pipeline.options import build_config, located
from pipeline.progress import Reporter, human_seconds, reporter_for
from pipeline.retrain_config import RetrainConfig
from pipeline.retrain_plan import devices, inspect, spec_of
from pipeline.retrain_report import write_report
from pipeline.rundir import RunDirectory, check_free, check_same_model, disk_full_refused
from pipeline.settle import window_length
from pipeline.spending import Spending
from pipeline.tracking import Recorder, recorded_run
from stages.checkpoint import INDEX, resolve
from stages.errors import Refusal
from stages.flops import shapes_of, tracking_flops, training_flops
from stages.measure import perplexity_of
from stages.meter import peak_bytes
from stages.retrain_spec import RetrainSpec, Sources, SourceSpec
from stages.skeleton import read_config
from stages.tokens import TokenTable

STORE_BYTES = 128 << 20  # of Ray's object store: nothing large passes through it
TOLD_SECONDS = 5.0  # between two lines about steps
GATHERED = ("consolidated", "importances", "shadow")  # what the ranks leave beside the checkpoints
HELD = ("parameters", "optimizer", "shadow")  # what a rank says how many bytes it keeps of
SUMMARY = (
    *("output", "loss", "perplexity", "sparsity", "evaluations", "steps", "tokens", "seconds", "tokens_per_second"),
    *("ranks", "memory", "peak_memory", "mlflow_run_id", "tracking_uri", "warnings"),
)


@dataclass(frozen=True, slots=True)
class RetrainResult:
    """What a finished run gave; `run` is all of run.json."""

    output: Path
    loss: float | None  # nats a token on the evaluation text after the last step
    losses: list[float]  # of every step, nats a token, before it
    evaluations: list[tuple[int, float]]  # (steps done, loss)
    seconds: float  # of the steps alone, since the run was last resumed
    run_id: str | None  # in MLflow
    run: dict[str, Any]

    @property
    def perplexity(self) -> float | None:
        return None if self.loss is None else perplexity_of(self.loss)

    def summary(self) -> dict[str, Any]:
        """The object that `retrain --json` prints."""
        return {name: self.run[name] for name in SUMMARY}


def retrain(
    config: RetrainConfig,
    reporter: Reporter | None = None,
    ranks: Ranks | None = None,
    sources: Sources | None = None,
) -> RetrainResult:
    """Train a model as `config` says; the result's directory is a plain Hugging Face checkpoint.

    `ranks`: ranks that are running, to use one set for several runs; else the run starts its own. Raises Refusal,
    before anything is written, for what cannot work.
    """
    config = located(config, "model", "data", "eval", "mask")
    check_free(Path(config.output))
    facts, fingerprint = inspect(config)
    place = devices(config, facts.dtype, ranks)
    asked = config.model_dump(mode="json")
    directory, run = RunDirectory.begin(
        Path(config.output), "retrain", asked, model=facts.summary(), fingerprint=fingerprint
    )
    single = _Run(config, facts, place, directory, run, reporter, ranks, sources)
    with directory.at_work(lambda: single.worked):
        return single.go()


def resume(
    output: Path,
    reporter: Reporter | None = None,
    ranks: Ranks | None = None,
    sources: Sources | None = None,
    changes: Mapping[str, Any] | None = None,
) -> RetrainResult:
    """Go on with an interrupted run from its newest checkpoint; `changes` are options to change: ranks, zero_stage.

    Raises Refusal if there is no run to go on with, or the model is not the one it began with.
    """
    directory, run = RunDirectory.reopen(output.expanduser().absolute())
    with directory.at_work():
        config = build_config(run["config"] | dict(changes or {}), RetrainConfig)
        facts, fingerprint = inspect(config)
        check_same_model(run, fingerprint)
        place = devices(config, facts.dtype, ranks)
        return _Run(config, facts, place, directory, run, reporter, ranks, sources).go()


class _Run:
    """One run from tokens to the finished checkpoint. `run` grows into run.json."""

    def __init__(
        self,
        config: RetrainConfig,
        facts: ModelFacts,
        place: tuple[str, int],
        directory: RunDirectory,
        run: dict[str, Any],
        reporter: Reporter | None,
        ranks: Ranks | None,
        sources: Sources | None,
    ) -> None:
        self.config, self.facts, self.directory, self.run = config, facts, directory, run
        self.given, self.sources = ranks, sources
        self.reporter = reporter or reporter_for(Console(stderr=True))
        self.length = window_length(facts, config.length)
        self.device, self.ranks = place
        self.worked = False  # whether there is anything to go on from
        self.warnings: list[str] = []
        self.losses: dict[int, float] = {}
        self.evaluations: dict[int, float] = {entry["step"]: entry["loss"] for entry in directory.noted("evaluated")}
        self.memory: dict[int, dict[str, int]] = {}
        self.peaks: dict[int, int] = {}
        self.spending = Spending()
        self.nodes = 1
        self.seconds = self.tracking = 0.0  # of the steps that were told, and of these what the shadow took
        self.tokens = self.snapshots = 0
        self.told = 0.0

    # -- phases ----------------------------------------------------------------------------------------------------

    def go(self) -> RetrainResult:
        """The whole run. On any failure the directory stays as `espalier resume` wants it."""
        with ExitStack() as held:
            held.enter_context(disk_full_refused(self.directory.output))
            held.enter_context(self.spending)
            held.callback(self.reporter.close)
            with self.spending.phase("tokens"):
                sources = self.sources or self._token_sources()
            spec = spec_of(self.config, self.facts.dtype, self.length, self.ranks, self.directory.home, sources)
            recorder = self._recorder(spec)
            try:
                with self.spending.phase("connect"):
                    ranks = held.enter_context(self._connected())
                with self.spending.phase("train"):
                    self._train(ranks, spec, recorder)
                with self.spending.phase("assemble"):
                    self._publish(spec)
                self._finish(spec, recorder)
            except BaseException as failure:
                recorder.abandon(failure)
                raise
        losses = [self.losses[step] for step in sorted(self.losses)]
        evaluations = sorted(self.evaluations.items())
        run = self.run
        return RetrainResult(
            Path(run["output"]), run["loss"], losses, evaluations, self.seconds, run["mlflow_run_id"], run
        )

    @contextmanager
    def _connected(self) -> Iterator[Ranks]:
        if self.given is not None:
            yield self.given
            return
        config = self.config
        cpus = self.ranks * config.threads
        gpus = self.ranks if self.device == "cuda" else 0
        with connect(config.address, cpus=cpus, gpus=gpus, object_store_bytes=STORE_BYTES):
            self.nodes = len(nodes())
            if self.nodes > 1:
                self.reporter.note("several nodes: --output must lie on storage that all of them share")
            with Ranks(self.ranks, threads=config.threads, device=self.device, on_event=self.reporter.note) as ranks:
                yield ranks

    def _token_sources(self) -> Sources:
        config = self.config
        table = self._table("training", config.data)
        evaluation = None if config.eval is None else self._table("evaluation", config.eval)
        return Sources(data=_windows(table), eval=None if evaluation is None else _windows(evaluation))

    def _table(self, purpose: Purpose, source: Any) -> TokenTable:
        """The text in windows."""
        return token_table(purpose, source, self.config, self.facts.vocabulary, self.length, self.directory.home)

    # -- what the ranks tell ---------------------------------------------------------------------------------------

    def _train(self, ranks: Ranks, spec: RetrainSpec, recorder: Recorder) -> None:
        self.reporter.note(
            f"{self.config.recipe_name}: {Path(self.config.model).name} ({self.facts.family}, "
            f"{self.facts.parameters / 1e6:,.1f} M parameters, {spec.dtype}) on {self.ranks} "
            f"rank{'s' if self.ranks > 1 else ''}, {spec.steps:,} steps of {spec.batch} x {self.length} tokens"
        )
        with closing(ranks.train(spec)) as events:
            for event in events:
                self._hear(event, spec, recorder)

    def _hear(self, event: dict[str, Any], spec: RetrainSpec, recorder: Recorder) -> None:
        """One event of `stages.retrain.train`; of those of all ranks alike, rank 0's."""
        rank, step = event["rank"], event.get("step", 0)
        match event["event"]:
            case "holds":
                self.memory[rank] = {name: event[name] for name in HELD if name in event}
                recorder.metrics({f"memory/{name}_bytes_rank{rank}": n for name, n in self.memory[rank].items()})
            case "done":
                self.peaks[rank] = event["peak_memory"]
                self.losses = dict(enumerate(event["losses"]))
            case _ if rank != 0:
                pass
            case "begin":
                self.worked = True
                if step:
                    self.reporter.note(f"going on after step {step}")
            case "steps":
                self._steps_told(event, spec, recorder)
            case "evaluated":
                loss = self.evaluations[step] = event["loss"]
                self.directory.note("evaluated", step=step, loss=loss)
                recorder.metrics({"eval/loss": loss, "eval/perplexity": perplexity_of(loss)}, step)
                self.reporter.note(
                    f"step {step}/{spec.steps}   evaluated: loss {loss:.4f}   perplexity {perplexity_of(loss):,.2f}"
                )
            case "saved":
                self.directory.note("checkpoint", step=step)

    def _steps_told(self, event: dict[str, Any], spec: RetrainSpec, recorder: Recorder) -> None:
        losses, rates, first = event["losses"], event["rates"], event["first"]
        for step, (loss, rate) in enumerate(zip(losses, rates, strict=True), first + 1):
            recorder.metrics({"train/loss": loss, "train/learning_rate": rate}, step)
        done = first + len(losses)
        speed = event["tokens"] / event["seconds"]
        recorder.metrics({"train/tokens_per_second": speed}, done)
        self.losses |= dict(enumerate(losses, first))
        self.seconds += event["seconds"]
        self.tracking += event["tracking"]
        self.tokens += event["tokens"]
        if spec.shadow is not None:
            self.snapshots += done // spec.shadow.every - first // spec.shadow.every
        if not all(math.isfinite(loss) for loss in losses):
            raise Refusal(f"step {done}: the loss is not finite; lower --learning-rate, or set --clip")
        if time.monotonic() - self.told > TOLD_SECONDS or done == spec.steps:
            self.told = time.monotonic()
            left = event["seconds"] / max(1, len(losses)) * (spec.steps - done)
            self.reporter.note(
                f"step {done}/{spec.steps}   loss {losses[-1]:.4f}   rate {rates[-1]:.1e}   "
                f"{speed:,.0f} tokens/s" + (f"   eta {human_seconds(left)}" if left else "")
            )

    # -- the end ---------------------------------------------------------------------------------------------------

    def _publish(self, spec: RetrainSpec) -> None:
        """The consolidated model under its final names, its index last, with all that lies beside the weights."""
        output, consolidated = self.directory.output, self.directory.home / "consolidated"
        copy_companions(Path(spec.model), output, spec.dtype)
        weights = [path for path in consolidated.iterdir() if path.suffix == ".safetensors" or path.name == INDEX]
        for path in sorted(weights, key=lambda path: path.name == INDEX):
            os.replace(path, output / path.name)
        if spec.shadow is not None:
            shutil.rmtree(output / "shadow", ignore_errors=True)
            os.replace(self.directory.home / "shadow", output / "shadow")

    def _finish(self, spec: RetrainSpec, recorder: Recorder) -> None:
        run, last = self.run, max(self.evaluations, default=None)
        loss = None if last is None else self.evaluations[last]
        run |= {
            "config": self.config.model_dump(mode="json"),
            "loss": loss,
            "perplexity": None if loss is None else perplexity_of(loss),
            "evaluations": sorted(self.evaluations.items()),
            "steps": spec.steps,
            "tokens": spec.steps * spec.batch * self.length,
            "sparsity": sparsity_of(self.directory.output),
            "tokens_per_second": self.tokens / self.seconds if self.seconds else None,
            "ranks": self.ranks,
            "memory": [self.memory[rank] for rank in sorted(self.memory)],
            "peak_memory": {"driver": peak_bytes(), "ranks": [self.peaks[rank] for rank in sorted(self.peaks)]},
            "status": "finished",
            "warnings": self.warnings,
            "tracking_uri": recorder.tracking_uri,
            "mlflow_run_id": recorder.wait_for_run_id(5),
            "report": str(self.directory.home / "report.md"),
        }
        run |= self._spent(spec)
        totals = total_metrics(run) | ({} if loss is None else {"loss": loss})
        recorder.metrics(totals | {f"peak_memory_mb/rank{rank}": peak / 1e6 for rank, peak in self.peaks.items()})
        self.directory.write(run)
        losses = [self.losses[step] for step in sorted(self.losses)]
        for path in [self.directory.run_file, *write_report(run, losses, self.directory.home)]:
            recorder.artifact(path)
        recorder.close()
        if recorder.warning:
            self.warnings.append(recorder.warning)
            self.reporter.note(f"warning: {recorder.warning}")
            self.directory.write(run)
        for leftover in [*self.directory.home.glob("checkpoint-*"), *(self.directory.home / name for name in GATHERED)]:
            shutil.rmtree(leftover, ignore_errors=True)

    def _spent(self, spec: RetrainSpec) -> dict[str, Any]:
        """seconds, energy and flops by phase, since the run was last resumed."""
        shapes = shapes_of(self.facts.linears, read_config(resolve(self.config.model), self.config.trust_remote_code))
        flops, seconds = {"steps": training_flops(shapes, self.tokens, self.length)}, {"steps": self.seconds}
        if spec.shadow is not None:
            flops["track"], seconds["track"] = tracking_flops(self.facts.parameters, self.snapshots), self.tracking
        spent = self.spending.record(self.nodes, shapes, self.length, flops)
        return spent | {"seconds": seconds | spent["seconds"]}

    def _recorder(self, spec: RetrainSpec) -> Recorder:
        config = self.config
        return Recorder(
            experiment=config.experiment,
            run_name=config.name(),
            params=config.model_dump(mode="json", exclude={"data", "eval"})
            | {"data": config.data if isinstance(config.data, str) else "a list"}
            | {"length": self.length, "ranks": self.ranks, "microbatch": spec.microbatch, "total_steps": spec.steps}
            | {"dtype": spec.dtype, "family": self.facts.family},
            tags={"espalier.run_id": self.run["run_id"], "espalier.command": "retrain"},
            directory=self.directory.home,
            run_id=recorded_run(self.directory.home),
            parent=config.parent_run,
        )


def _windows(table: TokenTable) -> SourceSpec:
    return SourceSpec(factory="stages.batches:TokenWindows", options={"path": str(table.path)})
