"""`espalier prune` and its resume: the request is checked before anything is written, then the run is made."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from espalier.pipeline.config.options import build_config, located
from espalier.pipeline.config.prune import PruneConfig
from espalier.pipeline.planning.model_info import ModelInfo, check_headers
from espalier.pipeline.planning.placement import Load, arrange, check_disk
from espalier.pipeline.planning.resolve import check_recipe_fits, resolve_auto
from espalier.pipeline.pruning.run import PruneRun
from espalier.pipeline.record.run_record import PruneRecord
from espalier.pipeline.run.directory import RunDirectory, check_free, check_same_model
from espalier.pipeline.run.inputs import check_calibration
from espalier.pipeline.run.new_family import tried_facts
from espalier.pipeline.run.progress import Reporter
from espalier.stages.layer_rules import AMOUNTS
from espalier.stages.loading.skeleton import read_config
from espalier.stages.shadow.store import check_shadow
from espalier.stages.storage.hf_checkpoint import Checkpoint, resolve

SUMMARY = (
    *(
        "output",
        "sparsity",
        "dense_perplexity",
        "perplexity",
        "kl",
        "top1_agreement",
        "seconds",
        "peak_memory",
        "estimate",
    ),
    *("shards", "blocks", "mlflow_run_id", "tracking_uri", "warnings"),
)


@dataclass(frozen=True, slots=True)
class PruneResult:
    """What a finished run gave; `run` is all of run.json."""

    output: Path
    sparsity: float
    perplexity: float | None
    dense_perplexity: float | None
    kl: float | None  # KL(dense || pruned), nats a token
    top1_agreement: float | None
    run: PruneRecord

    def summary(self) -> dict[str, Any]:
        """The object that `prune --json` prints."""
        run: Mapping[str, Any] = self.run
        return {name: run[name] for name in SUMMARY}


def prune(config: PruneConfig, reporter: Reporter | None = None) -> PruneResult:
    """Prune a model as `config` says; the result's directory is a plain Hugging Face checkpoint.

    Raises Refusal, before anything is written, for what cannot work; and later for what the machine does not allow.
    """
    config = _located(config)
    output = Path(config.output)
    check_free(output)
    facts, fingerprint = inspect(config)
    config = resolve_auto(config, facts)
    layout = arrange(config, facts, Load.of_pruning(config))
    check_disk(output, facts)
    asked = config.model_dump(mode="json")
    directory, run = RunDirectory.begin(output, "prune", asked, fingerprint, facts.summary())
    single = PruneRun(config, facts, layout, directory, cast(PruneRecord, run), reporter)
    with directory.at_work(lambda: single.worked):
        return _result(single)


def resume(output: Path, shards: int | None = None, reporter: Reporter | None = None) -> PruneResult:
    """Go on with an interrupted run, with another number of shards if wanted; the bytes come out the same.

    Raises Refusal if there is no run to go on with, or the model is not the one it began with.
    """
    directory, reopened = RunDirectory.reopen(output.expanduser().absolute())
    run = cast(PruneRecord, reopened)
    with directory.at_work():
        config = build_config(recorded_request(run["config"], shards), PruneConfig)
        if "compute" in run:  # what the run found units for, whatever this machine has
            config = config.model_copy(update={"compute": run["compute"]})
        facts, fingerprint = inspect(config)
        check_same_model(run, fingerprint)
        layout = arrange(config, facts, Load.of_pruning(config))
        return _result(PruneRun(config, facts, layout, directory, run, reporter))


def _result(single: PruneRun) -> PruneResult:
    """What the run gave, run to its end."""
    run = single.go()
    return PruneResult(
        Path(run["output"]),
        run["sparsity"],
        run["perplexity"],
        run["dense_perplexity"],
        run["kl"],
        run["top1_agreement"],
        run,
    )


def _located(config: PruneConfig) -> PruneConfig:
    """`config` with its paths absolute; scratch is one although it may not be there yet."""
    scratch = str(Path(config.scratch).expanduser().absolute()) if config.scratch else config.scratch
    return located(config, "model", "calibration", "eval", "shadow").model_copy(update={"scratch": scratch})


def recorded_request(recorded: dict[str, Any], shards: int | None) -> dict[str, Any]:
    """The options that a run.json records, as they were given: one way to say how much goes, shards as wanted now."""
    used = next(name for name in ("pattern", "threshold", "sparsity") if recorded.get(name) is not None)
    kept = {name: value for name, value in recorded.items() if name == used or name not in AMOUNTS}
    if used == "threshold":
        kept.pop("scope")  # has no say in it, and may not be given as its default
    return kept | ({"shards": shards} if shards else {})


def inspect(config: PruneConfig) -> tuple[ModelInfo, str]:
    model = resolve(config.model)
    checkpoint, settings = Checkpoint(model), read_config(model, config.trust_remote_code)
    facts = tried_facts(settings, config.model, config.dtype, checkpoint, config.tower)
    check_recipe_fits(facts, config.block_recipe)
    check_calibration(config, facts)
    fingerprint = check_headers(facts, checkpoint)
    if config.shadow is not None:
        fingerprint += check_shadow(Path(config.shadow), settings)
    return facts, fingerprint
