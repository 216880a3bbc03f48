"""The order of work of a pruning run. It decides and records; weights and activations never pass through here."""

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from espalier.cluster.connection.connect import connect
from espalier.cluster.connection.inventory import nodes
from espalier.cluster.connection.redact import without_secrets
from espalier.cluster.shard_group import ShardGroup, Stream
from espalier.pipeline.config.prune import PruneConfig
from espalier.pipeline.planning.model_info import ModelInfo
from espalier.pipeline.planning.placement import Layout, ShardLayout
from espalier.pipeline.planning.resolve import removes_nothing
from espalier.pipeline.planning.windows import microbatch_size, window_length
from espalier.pipeline.record.metric_names import COMPUTE_TAG, block_metrics, total_metrics
from espalier.pipeline.record.recorder import Recorder, recorded_run
from espalier.pipeline.record.run_record import Measured, PruneRecord, ShardRecord, Span
from espalier.pipeline.reports.prune import write_report
from espalier.pipeline.run.costs import CostMeter
from espalier.pipeline.run.directory import RunDirectory, disk_full_refused
from espalier.pipeline.run.export import copy_companions, write_index
from espalier.pipeline.run.inputs import Purpose, image_file, image_table, stream_of, tell, token_table
from espalier.pipeline.run.own_modules import criteria_of, own_files
from espalier.pipeline.run.progress import Reporter, reporter_for
from espalier.pipeline.run.stopping import at_the_last
from espalier.stages.allocation import owl
from espalier.stages.block_report import BlockReport
from espalier.stages.data.image_table import ImageTable
from espalier.stages.data.token_table import TokenTable
from espalier.stages.loading.skeleton import read_config
from espalier.stages.metrics.flops import Shapes, encoder_shapes, shapes_of
from espalier.stages.metrics.perplexity import Measures
from espalier.stages.metrics.profile import peak_bytes
from espalier.stages.recipe import BlockTask
from espalier.stages.shard.mask_selection import EXPERT_TOKENS
from espalier.stages.storage.hf_checkpoint import resolve

PACKAGES = ("torch", "transformers", "ray", "mlflow", "datasets", "pyarrow", "safetensors", "espalier-llm")


class PruneRun:
    """One run from tokens to report. `run` grows into run.json."""

    def __init__(
        self,
        config: PruneConfig,
        facts: ModelInfo,
        layout: Layout,
        directory: RunDirectory,
        run: PruneRecord,
        reporter: Reporter | None,
    ) -> None:
        self.config, self.facts, self.layout, self.directory, self.run = config, facts, layout, directory, run
        self.reporter = reporter or reporter_for(Console(stderr=True))
        self.length = window_length(facts, config.length)
        self.recipe = config.block_recipe
        self.started = time.time()
        self.spending = CostMeter()
        self.nodes = 1
        self.warnings: list[str] = []
        self.worked = False  # whether there is anything to go on from
        self.scratch = Path(config.scratch) / run["run_id"] if config.scratch else directory.home / "scratch"

    def go(self) -> PruneRecord:
        """The whole run, and its run.json. On any failure the directory stays as `espalier resume` wants it."""
        with ExitStack() as held:
            held.enter_context(disk_full_refused(self.directory.output))
            held.callback(self.reporter.close)
            held.callback(shutil.rmtree, self.scratch, ignore_errors=True)
            held.enter_context(self.spending)
            if nothing := removes_nothing(self.facts, self.recipe):
                self._warn(nothing)
            return self._recorded_run(*self._tokens())

    def _recorded_run(self, calibration: TokenTable | ImageTable, evaluation: TokenTable | None) -> PruneRecord:
        recorder = self._recorder()
        try:
            with ExitStack() as held:
                held.enter_context(at_the_last(recorder.cut_short))
                shard_layout = self._connected(held)
                recorder.tag(COMPUTE_TAG, shard_layout.compute)
                group = held.enter_context(
                    ShardGroup(shard_layout.specs, self.config.threads, str(self.directory.run_file), self._warn)
                )
                self._work(group, shard_layout, calibration, evaluation, recorder)
            self._finish(recorder)
            image_file(self.directory.home).unlink(missing_ok=True)
        except BaseException as failure:
            recorder.abandon(failure)
            raise
        return self.run

    # -- phases ----------------------------------------------------------------------------------------------------

    def _tokens(self) -> tuple[TokenTable | ImageTable, TokenTable | None]:
        with self.spending.phase("tokens"):
            config, home = self.config, self.directory.home
            calibration: TokenTable | ImageTable | None = image_table(config, self.length, home)
            if calibration is None:
                calibration = self._text("calibration", config.calibration, config.samples)
            return calibration, None if config.eval is None else self._text("evaluation", config.eval)

    def _text(self, purpose: Purpose, source: Any, samples: int | None = None) -> TokenTable:
        table = token_table(purpose, source, self.config, self.facts, self.length, self.directory.home, samples)
        self.run.setdefault("read", {})[purpose] = table.read
        tell(table, self.reporter.note, self._warn)
        return table

    def _connected(self, held: ExitStack) -> ShardLayout:
        """Ray connected for as long as `held` is, and the shards laid out on what the cluster has."""
        with self.spending.phase("connect"):
            layout = self.layout
            held.enter_context(
                connect(
                    self.config.address,
                    cpus=layout.local_cpus,
                    gpus=layout.local_gpus,
                    object_store_bytes=layout.object_store_bytes,
                    own=own_files(criteria_of(self.config.model_dump())),
                )
            )
            self.nodes = len(nodes())
            placed = layout.place(str(self.directory.output), str(self.scratch), self.recipe)
        shards = [ShardRecord(index=spec.index, first=spec.first, last=spec.last - 1) for spec in placed.specs]
        self.run |= {"estimate": placed.estimate, "shards": shards, "compute": placed.compute}
        self.directory.write(self.run)
        return placed

    def _work(
        self,
        group: ShardGroup,
        layout: ShardLayout,
        calibration: TokenTable | ImageTable,
        evaluation: TokenTable | None,
        recorder: Recorder,
    ) -> None:
        with self.spending.phase("load"):
            facts = group.open()
        for shard, fact in zip(self.run["shards"], facts, strict=True):
            shard["node"], shard["device"] = fact.node, fact.device
        self.reporter.note(self._headline(layout))
        for remark in self.facts.remarks:
            self._warn(remark)
        self.run["dense_perplexity"] = self._dense_perplexity(group, evaluation)
        finished = self._sweeps(group, layout, self._stream(calibration), len(calibration), recorder)
        self.run["blocks"] = [finished[block] for block in sorted(finished)]
        with self.spending.phase("assemble"):
            ends = self.directory.finished_ends()
            if ends is None:
                self.directory.note_ends(ends := list(group.copy_ends()))
            output = self.directory.output
            copy_companions(resolve(self.config.model), output, self.config.dtype)
            write_index(output, [*(report["file"] for report in self.run["blocks"]), *ends])
        self.run |= self._measured(group, evaluation)
        records = group.record()
        self.run["peak_memory"] = {"shards": [peak for peak, _ in records]}
        self.run["timeline"] = [
            Span(
                phase=phase.phase,
                block=phase.block,
                start=phase.start - self.started,
                end=phase.end - self.started,
                shard=shard,
            )
            for shard, (_, phases) in enumerate(records)
            for phase in phases
        ]

    def _sweeps(
        self, group: ShardGroup, layout: ShardLayout, stream: Stream, samples: int, recorder: Recorder
    ) -> dict[int, BlockReport]:
        """Reports of the last sweep's blocks; what an earlier run of this directory finished is not done again."""
        last, everything = self.recipe.sweeps, set(range(self.facts.blocks))
        done = {sweep: self.directory.finished_blocks(sweep, last) for sweep in range(last + 1)}
        first = max((sweep + 1 for sweep in done if done[sweep].keys() == everything), default=0)
        for sweep in range(first, last + 1):
            todo = everything - done[sweep].keys()
            weighed = any(self.directory.noted("allocation"))
            ratios = self._ratios(group, stream, samples) if sweep == 0 and self.recipe.allocation == "owl" else None
            orders = [
                BlockTask(
                    blocks=blocks, sweep=sweep, sparsity=tuple(ratios[block] for block in blocks) if ratios else None
                )
                for spec in layout.specs
                for blocks in spec.block_windows
                if todo & set(blocks)
            ]
            streams = self.recipe.most_streams if self.recipe.sequential else len(self.recipe.sources(sweep))
            if not self.recipe.sequential:  # the last shard's blocks wait for its work
                passed = 0 if ratios and not weighed else samples * streams * layout.specs[-1].first
                with self.spending.phase("stream", passed // self.facts.blocks):
                    name = f"stream, sweep {sweep}" if sweep else "stream"
                    group.calibrate(stream, todo, self.reporter.pass_begins(name, stream.microbatches), sweep)
            self.worked = True
            with self.spending.phase("work", samples * streams * len(todo) // self.facts.blocks):
                done[sweep] |= self._work_off(group, layout, stream, orders, len(done[sweep]), recorder)
            self.directory.drop_sweep(sweep - 1, last)
        return done[last]

    def _work_off(
        self,
        group: ShardGroup,
        layout: ShardLayout,
        stream: Stream,
        orders: list[BlockTask],
        finished: int,
        recorder: Recorder,
    ) -> dict[int, BlockReport]:
        """The reports of all blocks of `orders`, each journalled as it comes."""
        todo = {block for order in orders for block in order.blocks}
        self.reporter.work_begins(
            {spec.index: len(todo & set(range(spec.first, spec.last))) for spec in layout.specs}, finished
        )
        name = self.config.mask_name if not orders[0].sweep else f"sweep {orders[0].sweep}"
        reports: dict[int, BlockReport] = {}
        for report in (report for reports in self._worked(group, stream, orders) for report in reports):
            self.directory.note("block", **report)
            recorder.metrics(block_metrics(report), step=report["block"])
            self.reporter.block_done(report, name, self.facts.blocks)
            self._tell_fallbacks(report)
            reports[report["block"]] = report
        return reports

    def _worked(self, group: ShardGroup, stream: Stream, orders: list[BlockTask]) -> Iterator[list[BlockReport]]:
        return group.work_in_order(stream, orders) if self.recipe.sequential else group.work(stream, orders)

    def _ratios(self, group: ShardGroup, stream: Stream, samples: int) -> list[float]:
        """Each block's sparsity by OWL, the same again when the run is resumed."""
        for entry in self.directory.noted("allocation"):
            return list(entry["sparsity"])
        blocks = range(self.facts.blocks)
        with self.spending.phase("stream", samples):
            shares = group.outlier_shares(stream, blocks)
        ratios = owl(shares, self.config.sparsity, weights=self.facts.prunable_by_block)
        self.directory.note("allocation", sparsity=ratios, outlier_shares=shares)
        return ratios

    def _tell_fallbacks(self, report: BlockReport) -> None:
        """Say which experts saw too little to be scored."""
        if few := report["fallbacks"]:
            name, tokens = next(iter(few.items()))
            self._warn(
                f"block {report['block']}: {len(few)} expert matrices were pruned by magnitude, as their experts saw "
                f"fewer than {EXPERT_TOKENS} tokens ({name}: {tokens}); use more --samples"
            )

    def _stream(self, table: TokenTable | ImageTable) -> Stream:
        microbatch = microbatch_size(self.config.microbatch, self.length, self.facts.packed)
        return stream_of(table, microbatch, self.config.window)

    def _dense_perplexity(self, group: ShardGroup, table: TokenTable | None) -> float | None:
        if table is None:
            return None
        for entry in self.directory.noted("dense_perplexity"):
            return float(entry["value"])
        measures = self._evaluation(group, table, "evaluate_dense", None, "kept")
        self.directory.note("dense_perplexity", value=measures.perplexity, tokens=measures.tokens)
        return measures.perplexity

    def _measured(self, group: ShardGroup, table: TokenTable | None) -> Measured:
        if table is None:
            return Measured(perplexity=None, kl=None, top1_agreement=None)
        for entry in self.directory.noted("measured"):
            return Measured(perplexity=entry["perplexity"], kl=entry["kl"], top1_agreement=entry["top1_agreement"])
        measures = self._evaluation(group, table, "evaluate", self.recipe.sweeps, "compared")
        values = Measured(perplexity=measures.perplexity, kl=measures.kl, top1_agreement=measures.top1_agreement)
        self.directory.note("measured", **values, tokens=measures.tokens)
        return values

    def _evaluation(
        self, group: ShardGroup, table: TokenTable, phase: str, source: int | None, wanted: Literal["kept", "compared"]
    ) -> Measures:
        stream = self._stream(table)
        with self.spending.phase(phase, len(table)):
            step = self.reporter.pass_begins(phase, stream.microbatches)
            return group.measure(stream, step, source, wanted)

    # -- the record ------------------------------------------------------------------------------------------------

    def _recorder(self) -> Recorder:
        config = self.config
        return Recorder(
            experiment=config.experiment,
            run_name=config.run_name or f"{Path(config.model).name} {config.recipe_name}",
            params=config.model_dump(mode="json", exclude={"calibration"})
            | {"calibration": config.calibration if isinstance(config.calibration, str) else "a list"}
            | {"length": self.length, "blocks": self.facts.blocks, "family": self.facts.family},
            tags={"espalier.run_id": self.run["run_id"], "espalier.command": "prune"},
            directory=self.directory.home,
            run_id=recorded_run(self.directory.home),
            parent=config.parent_run,
        )

    def _headline(self, layout: ShardLayout) -> str:
        facts, config = self.facts, self.config
        peak = max(shard["peak"] for shard in layout.estimate["shards"])
        return (
            f"{config.recipe_name}: {Path(config.model).name} ({facts.family}, {facts.parameters / 1e6:,.1f} M "
            f"parameters, {facts.blocks} blocks, {facts.dtype} computed in {layout.compute}) on {len(layout.specs)} "
            f"shards, resident {layout.resident}; estimate {peak / 1e9:.2f} GB a shard"
        )

    def _shapes(self) -> Shapes:
        facts, config = self.facts, self.config
        if facts.tower == "vision":
            return encoder_shapes(facts.linears, facts.blocks, facts.hidden)
        return shapes_of(facts.linears, read_config(resolve(config.model), config.trust_remote_code))

    def _warn(self, text: str) -> None:
        text = without_secrets(text)
        self.warnings.append(text)
        self.reporter.note(f"warning: {text}")

    def _finish(self, recorder: Recorder) -> None:
        run, layers = self.run, [layer for block in self.run["blocks"] for layer in block["layers"].values()]
        run["sparsity"] = sum(layer["zeros"] for layer in layers) / sum(layer["weights"] for layer in layers)
        run["peak_memory"] = {"driver": peak_bytes(), **run["peak_memory"]}
        reconstructed = sum(unit["flops"] for block in run["blocks"] for unit in block["units"])
        run |= self.spending.record(self.nodes, self._shapes(), self.length, {"work": reconstructed})
        run["versions"] = {name: version(name) for name in PACKAGES}
        run["status"], run["warnings"] = "finished", self.warnings
        run["tracking_uri"], run["mlflow_run_id"] = recorder.tracking_uri, recorder.wait_for_run_id(5)
        recorder.metrics(total_metrics(run))
        self.directory.write(run)
        for path in [self.directory.run_file, *write_report(run, self.directory.home)]:
            recorder.artifact(path)
        recorder.close()
        if recorder.warning:
            self._warn(recorder.warning)
        self.directory.finish(run)
