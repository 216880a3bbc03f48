"""A training run: tokens, ranks, what they tell, the record, and a plain checkpoint at the end."""

import hashlib
import math
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.connect import connect, nodes
from cluster.extensions import check_compiler
from cluster.ranks import Ranks
from pipeline.assemble import copy_companions
from pipeline.config import build_config
from pipeline.inputs import load_tokenizer
from pipeline.machine import cores
from pipeline.plan import ModelFacts, check_headers, model_facts, window_length
from pipeline.progress import Reporter, human_seconds, reporter_for
from pipeline.retrain_config import RetrainConfig
from pipeline.rundir import RunDirectory, check_free, disk_full_refused
from pipeline.tracking import Recorder, recorded_run
from stages.batches import open_source
from stages.checkpoint import INDEX, Checkpoint, resolve
from stages.errors import Refusal
from stages.meter import peak_bytes
from stages.retrain_model import check_mask, has_weights
from stages.retrain_spec import RetrainSpec, SourceSpec
from stages.skeleton import read_config
from stages.tokens import TokenTable, build_token_table

STORE_BYTES = 128 << 20  # of Ray's object store: nothing large passes through it
MICROBATCH_TOKENS = 8192
TOLD_SECONDS = 5.0  # between two lines about steps
GATHERED = ("consolidated", "importances", "shadow")  # what the ranks leave beside the checkpoints
HELD = ("parameters", "optimizer", "shadow")  # what a rank says how many bytes it keeps of
SUMMARY = (
    *("output", "loss", "perplexity", "evaluations", "steps", "tokens", "seconds", "tokens_per_second", "ranks"),
    *("memory", "peak_memory", "mlflow_run_id", "tracking_uri", "warnings"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """What to train and to evaluate on where that is not text: `RetrainConfig.data` is then a name for the record."""

    data: SourceSpec
    eval: SourceSpec | None = None


@dataclass(frozen=True, slots=True)
class RetrainResult:
    """What a finished run gave; `run` is all of run.json."""

    output: Path
    loss: float | None  # nats a token on the evaluation text after the last step
    losses: list[float]  # of every step, nats a token, before it
    evaluations: list[tuple[int, float]]  # (steps done, loss)
    seconds: float  # of the steps alone
    run_id: str | None  # in MLflow
    run: dict[str, Any]

    @property
    def perplexity(self) -> float | None:
        return None if self.loss is None else _perplexity(self.loss)

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
    config = _located(config)
    check_free(Path(config.output))
    facts, fingerprint = _inspect(config)
    if ranks is None:
        check_compiler()
    run = {
        "run_id": uuid.uuid4().hex[:12],
        "command": "retrain",
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": config.model_dump(mode="json"),
        "model": facts.summary(),
        "fingerprint": fingerprint,
        "output": config.output,
    }
    single = _Run(config, facts, run, reporter, ranks, sources)
    single.check_devices()
    single.directory = RunDirectory.claim(Path(config.output), run)
    try:
        return single.go()
    except Refusal:
        if not single.worked:
            single.directory.discard()
        raise
    finally:
        single.directory.release()


def resume(
    output: Path,
    reporter: Reporter | None = None,
    ranks: Ranks | None = None,
    sources: Sources | None = None,
    **changes: Any,
) -> RetrainResult:
    """Go on with an interrupted run from its newest checkpoint; `changes` may be `ranks` and `zero_stage`.

    Raises Refusal if there is no run to go on with, or the model is not the one it began with.
    """
    directory, run = RunDirectory.reopen(output.expanduser().absolute())
    try:
        config = build_config(run["config"] | changes, RetrainConfig)
        facts, fingerprint = _inspect(config)
        if fingerprint != run["fingerprint"]:
            raise Refusal(
                f"{config.model}: not the checkpoint that this run began with; put that one back, or start anew"
            )
        single = _Run(config, facts, run, reporter, ranks, sources)
        single.check_devices()
        single.directory = directory
        return single.go()
    finally:
        directory.release()


def _located(config: RetrainConfig) -> RetrainConfig:
    """`config` with its local paths absolute, so that the run can be resumed from any directory."""
    paths: dict[str, Any] = {"output": str(Path(config.output).expanduser().absolute())}
    for name in ("model", "data", "eval", "mask"):
        value = getattr(config, name)
        if isinstance(value, str) and Path(value).expanduser().exists():
            paths[name] = str(Path(value).expanduser().absolute())
    return config.model_copy(update=paths)


def _inspect(config: RetrainConfig) -> tuple[ModelFacts, str]:
    """The model's sizes, and a digest of what it is begun from."""
    model = resolve(config.model)
    settings = read_config(model, config.trust_remote_code)
    checkpoint = Checkpoint(model) if has_weights(model) else None
    facts = model_facts(settings, config.model, config.dtype, checkpoint)
    if config.mask is not None:
        check_mask(model, resolve(config.mask), config.trust_remote_code)
    if checkpoint is None:
        return facts, hashlib.sha256((model / "config.json").read_bytes()).hexdigest()
    return facts, check_headers(facts, checkpoint)


class _Run:
    """One run from tokens to the finished checkpoint. `run` grows into run.json."""

    directory: RunDirectory

    def __init__(
        self,
        config: RetrainConfig,
        facts: ModelFacts,
        run: dict[str, Any],
        reporter: Reporter | None,
        ranks: Ranks | None,
        sources: Sources | None,
    ) -> None:
        self.config, self.facts, self.run, self.given, self.sources = config, facts, run, ranks, sources
        self.reporter = reporter or reporter_for(Console(stderr=True))
        self.length = window_length(facts, config.length)
        self.device, self.ranks = self._devices()
        self.worked = False
        self.warnings: list[str] = []
        self.losses: dict[int, float] = {}
        self.evaluations: dict[int, float] = {}
        self.memory: dict[int, dict[str, int]] = {}
        self.peaks: dict[int, int] = {}
        self.seconds = 0.0  # of the steps that were told
        self.tokens = 0
        self.told = 0.0

    def _devices(self) -> tuple[str, int]:
        """Where the ranks are, and how many; on somebody's cluster `auto` counts what this machine sees."""
        config = self.config
        if self.given is not None:
            if config.ranks not in ("auto", self.given.ranks):
                raise Refusal(f"ranks {config.ranks}: the ranks that are running are {self.given.ranks}")
            return self.given.device, self.given.ranks
        import torch

        gpus = torch.cuda.device_count()
        device = config.device if config.device != "auto" else "cuda" if gpus else "cpu"
        room = gpus if device == "cuda" else max(1, cores() // config.threads)
        return device, room if config.ranks == "auto" else config.ranks

    def check_devices(self) -> None:
        """Raises Refusal for what this machine, or no machine, can do."""
        config = self.config
        if self.facts.dtype == "float16" and self.device == "cpu":
            raise Refusal("dtype float16 on a CPU: DeepSpeed trains it on GPUs only; use --dtype bfloat16 or float32")
        if self.given is None and config.address is None:
            room = cores() // config.threads if self.device == "cpu" else self._gpus()
            if self.ranks > room:
                what = f"CPU cores, at {config.threads} a rank," if self.device == "cpu" else "GPUs"
                raise Refusal(f"ranks {self.ranks}: this machine has {what} for {room}; use --ranks {room}")
        if config.batch % self.ranks:
            raise Refusal(f"batch {config.batch}: does not divide among {self.ranks} ranks; give a multiple of it")
        if config.microbatch != "auto" and config.batch % (config.microbatch * self.ranks):
            raise Refusal(
                f"microbatch {config.microbatch}: {self.ranks} ranks x {config.microbatch} does not divide the batch "
                f"of {config.batch}; change one of the three"
            )

    @staticmethod
    def _gpus() -> int:
        import torch

        return torch.cuda.device_count()

    # -- phases ----------------------------------------------------------------------------------------------------

    def go(self) -> RetrainResult:
        """The whole run. On any failure the directory stays as `espalier resume` wants it."""
        with ExitStack() as held:
            held.enter_context(disk_full_refused(self.directory.output))
            held.callback(self.reporter.close)
            sources = self.sources or self._token_sources()
            spec = self._spec(sources)
            recorder = self._recorder(spec)
            try:
                ranks = held.enter_context(self._connected())
                self._train(ranks, spec, recorder)
                self._publish(spec)
                self._finish(spec, recorder)
            except BaseException as failure:
                recorder.close("KILLED" if isinstance(failure, KeyboardInterrupt) else "FAILED", timeout_seconds=5)
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
            if len(nodes()) > 1:
                self.reporter.note("several nodes: --output must lie on storage that all of them share")
            with Ranks(
                self.ranks,
                threads=config.threads,
                device=self.device,
                offload=config.offload,
                on_event=self.reporter.note,
            ) as ranks:
                yield ranks

    def _token_sources(self) -> Sources:
        config = self.config
        table = self._table("training", config.data)
        evaluation = None if config.eval is None else self._table("evaluation", config.eval)
        return Sources(data=_windows(table), eval=None if evaluation is None else _windows(evaluation))

    def _table(self, purpose: str, source: Any) -> TokenTable:
        """The text in windows, the same again when the run is resumed."""
        path = self.directory.home / f"tokens-{purpose}.arrow"
        if path.exists():
            return TokenTable.open(path)
        reads = isinstance(source, str) or (source and isinstance(source[0], str))
        return build_token_table(
            source,
            load_tokenizer(self.config.model, self.config.trust_remote_code) if reads else None,
            length=self.length,
            samples=None,
            seed=self.config.seed,
            path=path,
            vocab_size=self.facts.vocabulary,
            purpose=purpose,
        )

    def _spec(self, sources: Sources) -> RetrainSpec:
        config = self.config
        names = (
            *("zero_stage", "offload", "batch", "learning_rate", "schedule", "warmup", "weight_decay", "beta2"),
            *("clip", "seed", "eval_every", "checkpoint_every", "trust_remote_code"),
        )
        return RetrainSpec(
            model=str(resolve(config.model)),
            mask=None if config.mask is None else str(resolve(config.mask)),
            home=str(self.directory.home),
            data=sources.data,
            eval=sources.eval,
            masked=config.holds_zeros,
            dtype=self.facts.dtype,
            steps=self._steps(len(open_source(sources.data))),
            microbatch=self._microbatch(),
            shadow=config.shadow_spec,
            **{name: getattr(config, name) for name in names},
        )

    def _steps(self, examples: int) -> int:
        config = self.config
        if config.steps is not None:
            return config.steps
        if config.tokens is not None:
            return math.ceil(config.tokens / (config.batch * self.length))
        return max(1, round((config.epochs or 1) * examples / config.batch))

    def _microbatch(self) -> int:
        config = self.config
        if config.microbatch != "auto":
            return config.microbatch
        each, most = config.batch // self.ranks, max(1, MICROBATCH_TOKENS // self.length)
        return max(size for size in range(1, each + 1) if each % size == 0 and size <= most)

    # -- what the ranks tell ---------------------------------------------------------------------------------------

    def _train(self, ranks: Ranks, spec: RetrainSpec, recorder: Recorder) -> None:
        self.reporter.note(
            f"{self.config.recipe_name}: {Path(self.config.model).name} ({self.facts.family}, "
            f"{self.facts.parameters / 1e6:,.1f} M parameters, {spec.dtype}) on {self.ranks} "
            f"rank{'s' if self.ranks > 1 else ''}, {spec.steps:,} steps of {spec.batch} x {self.length} tokens"
        )
        for event in ranks.train(spec):
            rank = event["rank"]
            match event["event"]:
                case "begin" if rank == 0:
                    self.worked = True
                    if event["step"]:
                        self.reporter.note(f"going on after step {event['step']}")
                case "holds":
                    self.memory[rank] = {name: event[name] for name in HELD if name in event}
                    recorder.metrics({f"memory/{name}_bytes_rank{rank}": n for name, n in self.memory[rank].items()})
                case "steps" if rank == 0:
                    self._steps_told(event, spec, recorder)
                case "evaluated" if rank == 0:
                    self.evaluations[event["step"]] = event["loss"]
                    recorder.metrics(
                        {"eval/loss": event["loss"], "eval/perplexity": _perplexity(event["loss"])}, event["step"]
                    )
                    self.reporter.note(
                        f"step {event['step']}/{spec.steps}   evaluated: loss {event['loss']:.4f}   "
                        f"perplexity {_perplexity(event['loss']):,.2f}"
                    )
                case "saved" if rank == 0:
                    self.directory.note("checkpoint", step=event["step"])
                case "done":
                    self.peaks[rank] = event["peak_memory"]
                    if rank == 0:
                        self.losses = dict(enumerate(event["losses"]))

    def _steps_told(self, event: dict[str, Any], spec: RetrainSpec, recorder: Recorder) -> None:
        losses, rates, first = event["losses"], event["rates"], event["first"]
        for step, (loss, rate) in enumerate(zip(losses, rates, strict=True), first + 1):
            recorder.metrics({"train/loss": loss, "train/learning_rate": rate}, step)
        done = first + len(losses)
        recorder.metrics({"train/tokens_per_second": event["tokens_per_second"]}, done)
        self.losses |= dict(enumerate(losses, first))
        self.seconds += event["seconds"]
        self.tokens += event["tokens"]
        if not all(math.isfinite(loss) for loss in losses):
            raise Refusal(f"step {done}: the loss is not finite; lower --learning-rate, or set --clip")
        if time.monotonic() - self.told > TOLD_SECONDS or done == spec.steps:
            self.told = time.monotonic()
            left = event["seconds"] / max(1, len(losses)) * (spec.steps - done)
            self.reporter.note(
                f"step {done}/{spec.steps}   loss {losses[-1]:.4f}   rate {rates[-1]:.1e}   "
                f"{event['tokens_per_second']:,.0f} tokens/s" + (f"   eta {human_seconds(left)}" if left else "")
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
            "perplexity": None if loss is None else _perplexity(loss),
            "evaluations": sorted(self.evaluations.items()),
            "steps": spec.steps,
            "tokens": spec.steps * spec.batch * self.length,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds if self.seconds else None,
            "ranks": self.ranks,
            "memory": [self.memory[rank] for rank in sorted(self.memory)],
            "peak_memory": {"driver": peak_bytes(), "ranks": [self.peaks[rank] for rank in sorted(self.peaks)]},
            "status": "finished",
            "warnings": self.warnings,
            "tracking_uri": recorder.tracking_uri,
            "mlflow_run_id": recorder.wait_for_run_id(5),
        }
        totals = {"perplexity": run["perplexity"], "loss": loss, "seconds/train": self.seconds}
        totals |= {f"peak_memory_mb/rank{rank}": peak / 1e6 for rank, peak in self.peaks.items()}
        recorder.metrics({name: value for name, value in totals.items() if value is not None})
        self.directory.write(run)
        recorder.artifact(self.directory.run_file)
        recorder.close()
        if recorder.warning:
            self.warnings.append(recorder.warning)
            self.reporter.note(f"warning: {recorder.warning}")
            self.directory.write(run)
        for leftover in [*self.directory.home.glob("checkpoint-*"), *(self.directory.home / name for name in GATHERED)]:
            shutil.rmtree(leftover, ignore_errors=True)

    def _recorder(self, spec: RetrainSpec) -> Recorder:
        config = self.config
        tags = {"espalier.run_id": self.run["run_id"], "espalier.command": "retrain"}
        if config.parent_run is not None:
            tags["mlflow.parentRunId"] = config.parent_run
        return Recorder(
            experiment=config.experiment,
            run_name=config.name(),
            params=config.model_dump(mode="json", exclude={"data", "eval"})
            | {"data": config.data if isinstance(config.data, str) else "a list"}
            | {"length": self.length, "ranks": self.ranks, "microbatch": spec.microbatch, "total_steps": spec.steps}
            | {"dtype": spec.dtype, "family": self.facts.family},
            tags=tags,
            directory=self.directory.home,
            run_id=recorded_run(self.directory.home),
        )


def _windows(table: TokenTable) -> SourceSpec:
    return SourceSpec(factory="stages.batches:TokenWindows", options={"path": str(table.path)})


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
