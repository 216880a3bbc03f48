"""A training run: tokens, ranks, their events, the record, and a plain checkpoint at the end."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from espalier.cluster.connection.connect import connect
from espalier.cluster.connection.inventory import nodes
from espalier.cluster.rank_group import RankGroup
from espalier.pipeline.config.options import build_config, located
from espalier.pipeline.config.retrain import RetrainConfig
from espalier.pipeline.planning.model_info import ModelInfo
from espalier.pipeline.planning.placement import DRIVER_BYTES
from espalier.pipeline.planning.windows import window_length
from espalier.pipeline.record.metric_names import COMPUTE_TAG, total_metrics
from espalier.pipeline.record.recorder import Recorder, recorded_run
from espalier.pipeline.record.run_record import RetrainRecord, Spent
from espalier.pipeline.reports.retrain import write_report
from espalier.pipeline.retraining.events import RunEvents
from espalier.pipeline.retraining.memory import check_ranks_fit, estimate_rank
from espalier.pipeline.retraining.plan import devices, inspect, spec_of
from espalier.pipeline.run.costs import CostMeter
from espalier.pipeline.run.directory import RunDirectory, check_free, check_same_model, disk_full_refused
from espalier.pipeline.run.export import copy_companions, sparsity_of, write_index
from espalier.pipeline.run.inputs import Purpose, tell, token_table
from espalier.pipeline.run.progress import Reporter, reporter_for
from espalier.pipeline.run.stopping import at_the_last
from espalier.stages.data.token_table import TokenTable
from espalier.stages.data.training_batches import Sources, SourceSpec
from espalier.stages.loading.skeleton import read_config
from espalier.stages.metrics.flops import shapes_of, tracking_flops, training_flops
from espalier.stages.metrics.perplexity import perplexity_of
from espalier.stages.metrics.profile import peak_bytes
from espalier.stages.precision import dtype_of, own_compute
from espalier.stages.storage.files import move_into_place
from espalier.stages.storage.headers import WEIGHTS
from espalier.stages.storage.hf_checkpoint import resolve
from espalier.stages.training.spec import RetrainSpec

STORE_BYTES = 128 << 20  # of Ray's object store: nothing large passes through it
TRAINED = "model-trained"  # the one file of a model that others lie beside: what it does not read
GATHERED = ("consolidated", "importances", "shadow")  # what the ranks leave beside the checkpoints
SUMMARY = (
    *("output", "loss", "perplexity", "sparsity", "evaluations", "steps", "tokens", "seconds", "tokens_per_second"),
    *("ranks", "memory", "peak_memory", "estimate", "mlflow_run_id", "tracking_uri", "warnings"),
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
    run: RetrainRecord

    @property
    def perplexity(self) -> float | None:
        return None if self.loss is None else perplexity_of(self.loss)

    def summary(self) -> dict[str, Any]:
        """The object that `retrain --json` prints."""
        run: Mapping[str, Any] = self.run
        return {name: run[name] for name in SUMMARY}


def retrain(
    config: RetrainConfig,
    reporter: Reporter | None = None,
    ranks: RankGroup | None = None,
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
    directory, run = RunDirectory.begin(Path(config.output), "retrain", asked, fingerprint, facts.summary())
    single = _Run(config, facts, place, directory, cast(RetrainRecord, run), reporter, ranks, sources)
    with directory.at_work(lambda: single.events.begun):
        return single.go()


def resume(
    output: Path,
    reporter: Reporter | None = None,
    ranks: RankGroup | None = None,
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
        return _Run(config, facts, place, directory, cast(RetrainRecord, run), reporter, ranks, sources).go()


class _Run:
    """One run from tokens to the finished checkpoint. `run` grows into run.json."""

    def __init__(
        self,
        config: RetrainConfig,
        facts: ModelInfo,
        place: tuple[str, int],
        directory: RunDirectory,
        run: RetrainRecord,
        reporter: Reporter | None,
        ranks: RankGroup | None,
        sources: Sources | None,
    ) -> None:
        self.config, self.facts, self.directory, self.run = config, facts, directory, run
        self.given, self.sources = ranks, sources
        self.reporter = reporter or reporter_for(Console(stderr=True))
        self.length = window_length(facts, config.length)
        self.device, self.ranks = place
        self.warnings: list[str] = []
        self.events = RunEvents(directory, self.reporter)
        self.spending = CostMeter()
        self.nodes = 1

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
            held.enter_context(at_the_last(recorder.cut_short))
            try:
                with ExitStack() as connection:
                    with self.spending.phase("connect"):
                        ranks = connection.enter_context(self._connected(spec))
                    with self.spending.phase("train"):
                        self._train(ranks, spec, recorder)
                with self.spending.phase("assemble"):
                    self._publish(spec)
                self._finish(spec, recorder)
            except BaseException as failure:
                recorder.abandon(failure)
                raise
        events, run = self.events, self.run
        return RetrainResult(
            Path(run["output"]),
            run["loss"],
            events.losses_in_order,
            run["evaluations"],
            events.seconds,
            run["mlflow_run_id"],
            run,
        )

    @contextmanager
    def _connected(self, spec: RetrainSpec) -> Iterator[RankGroup]:
        estimate = estimate_rank(self.facts, spec, self.ranks, self.length, self.device)
        self.run["estimate"] = {"driver": DRIVER_BYTES, "ranks": [asdict(estimate)] * self.ranks}
        if self.given is not None:
            yield self.given
            return
        config = self.config
        cpus = self.ranks * config.threads
        gpus = self.ranks if self.device == "cuda" else 0
        with connect(config.address, cpus=cpus, gpus=gpus, object_store_bytes=STORE_BYTES):
            self.nodes = len(members := nodes())
            check_ranks_fit(estimate, spec, self.ranks, members, self.device)
            if self.nodes > 1:
                self.reporter.note("several nodes: --output must lie on storage that all of them share")
            with RankGroup(
                self.ranks, threads=config.threads, device=self.device, on_event=self.reporter.note
            ) as ranks:
                yield ranks

    def _token_sources(self) -> Sources:
        config = self.config
        table = self._table("training", config.data)
        evaluation = None if config.eval is None else self._table("evaluation", config.eval)
        return Sources(data=_windows(table), eval=None if evaluation is None else _windows(evaluation))

    def _table(self, purpose: Purpose, source: Any) -> TokenTable:
        """The text in windows."""
        table = token_table(purpose, source, self.config, self.facts, self.length, self.directory.home)
        self.run.setdefault("read", {})[purpose] = table.read
        tell(table, self.reporter.note, self._warn)
        return table

    def _train(self, ranks: RankGroup, spec: RetrainSpec, recorder: Recorder) -> None:
        self.reporter.note(
            f"{self.config.recipe_name}: {Path(self.config.model).name} ({self.facts.family}, "
            f"{self.facts.parameters / 1e6:,.1f} M parameters, {spec.dtype}) on {self.ranks} "
            f"rank{'s' if self.ranks > 1 else ''}, {spec.steps:,} steps of {spec.batch} x {self.length} tokens"
        )
        for remark in self.facts.remarks:
            self.warnings.append(remark)
            self.reporter.note(f"warning: {remark}")
        with closing(ranks.train(spec)) as events:
            for event in events:
                self.events.take(event, spec, recorder)

    # -- the end ---------------------------------------------------------------------------------------------------

    def _publish(self, spec: RetrainSpec) -> None:
        """The consolidated model under its final names, its index last, with all that lies beside the weights."""
        output, consolidated = self.directory.output, self.directory.home / "consolidated"
        copy_companions(Path(spec.model), output, spec.dtype)
        weights = {path: path.name for path in sorted(consolidated.glob("*.safetensors"))}
        if len(weights) > 1:  # under its own name, the one file would be the whole model
            weights = {path: f"{TRAINED}.safetensors" if name == WEIGHTS else name for path, name in weights.items()}
        for path, name in weights.items():
            move_into_place(path, output / name)
        if len(weights) > 1:
            write_index(output, weights.values())
        if spec.shadow is not None:
            move_into_place(self.directory.home / "shadow", output / "shadow")

    def _finish(self, spec: RetrainSpec, recorder: Recorder) -> None:
        run, events = self.run, self.events
        last = max(events.evaluations, default=None)
        loss = None if last is None else events.evaluations[last]
        run |= {
            "config": self.config.model_dump(mode="json"),
            "loss": loss,
            "perplexity": None if loss is None else perplexity_of(loss),
            "evaluations": sorted(events.evaluations.items()),
            "steps": spec.steps,
            "tokens": spec.steps * spec.batch * self.length,
            "sparsity": sparsity_of(self.directory.output),
            "tokens_per_second": events.tokens / events.seconds if events.seconds else None,
            "ranks": self.ranks,
            "memory": [events.memory[rank] for rank in sorted(events.memory)],
            "peak_memory": {"driver": peak_bytes(), "ranks": [events.peaks[rank] for rank in sorted(events.peaks)]},
            "status": "finished",
            "warnings": self.warnings,
            "tracking_uri": recorder.tracking_uri,
            "mlflow_run_id": recorder.wait_for_run_id(5),
            "report": str(self.directory.home / "report.md"),
        }
        run |= self._spent(spec)
        recorder.metrics(total_metrics(run))
        self.directory.write(run)
        for path in [self.directory.run_file, *write_report(run, events.losses_in_order, self.directory.home)]:
            recorder.artifact(path)
        recorder.close()
        if recorder.warning:
            self._warn(recorder.warning)
        self.directory.finish(run)
        for leftover in [*self.directory.home.glob("checkpoint-*"), *(self.directory.home / name for name in GATHERED)]:
            shutil.rmtree(leftover, ignore_errors=True)

    def _warn(self, text: str) -> None:
        self.warnings.append(text)
        self.reporter.note(f"warning: {text}")

    def _spent(self, spec: RetrainSpec) -> Spent:
        """seconds, energy and flops by phase, since the run was last resumed."""
        events = self.events
        shapes = shapes_of(self.facts.linears, read_config(resolve(self.config.model), self.config.trust_remote_code))
        flops, seconds = {"steps": training_flops(shapes, events.tokens, self.length)}, {"steps": events.seconds}
        if spec.shadow is not None:
            flops["track"], seconds["track"] = tracking_flops(self.facts.parameters, events.snapshots), events.tracking
        spent = self.spending.record(self.nodes, shapes, self.length, flops)
        return {**spent, "seconds": seconds | spent["seconds"]}

    def _recorder(self, spec: RetrainSpec) -> Recorder:
        config = self.config
        return Recorder(
            experiment=config.experiment,
            run_name=config.name(),
            params=config.model_dump(mode="json", exclude={"data", "eval"})
            | {"data": config.data if isinstance(config.data, str) else "a list"}
            | {"length": self.length, "ranks": self.ranks, "microbatch": spec.microbatch, "total_steps": spec.steps}
            | {"dtype": spec.dtype, "family": self.facts.family},
            tags={"espalier.run_id": self.run["run_id"], "espalier.command": "retrain"}
            | {COMPUTE_TAG: own_compute(dtype_of(self.facts.dtype))},
            directory=self.directory.home,
            run_id=recorded_run(self.directory.home),
            parent=config.parent_run,
        )


def _windows(table: TokenTable) -> SourceSpec:
    return SourceSpec(factory="espalier.stages.data.training_batches:TokenWindows", options={"path": str(table.path)})
