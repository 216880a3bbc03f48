"""Every metric that MLflow is told, by name, with its unit and its meaning: reports and the README's index read it too.

A metric is recorded by `named`, which takes the names of this table only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from espalier.pipeline.record.mlflow_client import key_of
from espalier.pipeline.record.run_record import Cost, PruneRecord, RetrainRecord
from espalier.stages.block_report import BlockReport

MB = 1e6
COMPUTE_TAG = "espalier.compute"  # an MLflow tag: fp32, bf16 or fp16, what a run turned out to be computed in


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: its unit ("" where it has none, "metric" for what a track's data is measured in), what its step
    counts, what it means, and the file that computes it."""

    unit: str
    step: str
    meaning: str
    computed_in: str


_FIT, _BLOCK = "stages/reconstruction/fit.py", "stages/shard/block_pruner.py"
_MODEL, _HELD = "stages/metrics/perplexity.py", "stages/training/partition.py"
_TRACK, _PEAK = "pipeline/weight_tracking/experiment.py", "stages/metrics/profile.py"
_UNIT = "relative squared error of a unit (`self_attn`, `mlp`, `block`, `window`, or a layer's name)"

METRICS = {  # what stands in braces differs from metric to metric
    "{unit}/error_before": Metric("share", "block", f"{_UNIT} before its reconstruction", _FIT),
    "{unit}/error_after": Metric("share", "block", f"{_UNIT} after it", _FIT),
    "block/sparsity": Metric("share", "block", "zeros among the block's prunable weights", _BLOCK),
    "block/seconds": Metric("s", "block", "mask + reconstruct + stream + commit", "stages/shard/commit.py"),
    "block/tokens_per_second": Metric("1/s", "block", "calibration tokens through the block", "stages/shard/commit.py"),
    "block/gflops": Metric("10⁹/s", "block", "operations of the reconstruction over its seconds", _BLOCK),
    "block/peak_memory_mb": Metric("MB", "block", "peak of the shard when the block was written", _PEAK),
    "sparsity": Metric("share", "0", "zeros among the prunable weights", "pipeline/run/export.py"),
    "perplexity": Metric(
        "", "0", "exp(mean −log p) over every token but each window's first; of a track's point, exp of `tuned`", _MODEL
    ),
    "dense_perplexity": Metric("", "0", "the same before pruning; of a track's point, exp of `trained`", _MODEL),
    "kl": Metric("nats a token", "0", "KL(dense ‖ pruned)", _MODEL),
    "top1_agreement": Metric("share", "0", "most likely token the same as the dense model's", _MODEL),
    "seconds/{phase}": Metric(
        "s", "0", "a phase of the run, and `total`; of a track, a kind of work", "pipeline/run/costs.py"
    ),
    "flops/{phase}": Metric(
        "operations",
        "0",
        "a multiplication and an addition count two; of phase work those of the reconstruction alone",
        "stages/metrics/flops.py",
    ),
    "joules/{phase}/{source}": Metric(
        "J",
        "0",
        "of the driver's machine: cpu by RAPL, gpu by NVML; absent where nothing counts",
        "stages/metrics/energy.py",
    ),
    "peak_memory_mb/driver": Metric("MB", "0", "peak of the driver's process", _PEAK),
    "peak_memory_mb/shard_max": Metric("MB", "0", "peak of the largest shard", _PEAK),
    "peak_memory_mb/rank{n}": Metric("MB", "0", "peak of a rank", _PEAK),
    "train/loss": Metric(
        "nats a token", "step", "mean over the step's batch, before its update", "stages/training/rank.py"
    ),
    "train/learning_rate": Metric("", "step", "of that step", "stages/training/lr_schedule.py"),
    "train/tokens_per_second": Metric(
        "1/s", "step", "of all ranks, since it was last told", "pipeline/retraining/events.py"
    ),
    "eval/loss": Metric("nats a token", "step", "on the evaluation text", "stages/training/rank.py"),
    "eval/perplexity": Metric("", "step", "exp of `eval/loss`", _MODEL),
    "loss": Metric("nats a token", "0", "the last `eval/loss`", "pipeline/retraining/run.py"),
    "memory/parameters_bytes_rank{n}": Metric("bytes", "0", "parameters that rank N holds after its first step", _HELD),
    "memory/optimizer_bytes_rank{n}": Metric("bytes", "0", "its optimizer state", _HELD),
    "memory/shadow_bytes_rank{n}": Metric("bytes", "0", "its shadow", "stages/shadow/tracker.py"),
    "curve/rate": Metric("σ", "point", "a track's curve, in its parent run: `rate` of each point", _TRACK),
    "curve/sparsity": Metric("share", "point", "`sparsity` of each", _TRACK),
    "curve/pruned": Metric("metric", "point", "`pruned` of each", _TRACK),
    "curve/tuned": Metric("metric", "point", "`tuned` of each", _TRACK),
    "rate": Metric("σ", "0", "threshold of a track's point, in standard deviations of a matrix's scores", _TRACK),
    "pruned": Metric("metric", "0", "of a track's point, pruned and before fine-tuning", _TRACK),
    "tuned": Metric("metric", "0", "of a track's point, fine-tuned", _TRACK),
    "trained": Metric("metric", "0", "of a whole track: before pruning", _TRACK),
    "best": Metric("metric", "0", "of a whole track: the lowest `tuned`", _TRACK),
    "best_sparsity": Metric("share", "0", "its `sparsity`", _TRACK),
}


def named(values: Mapping[str, float | None], **parts: object) -> dict[str, float]:
    """The values as MLflow takes them, those that are None left out: names of METRICS, what stands in braces filled in
    from `parts`. Raises KeyError for a name that is not in the table."""
    for name in values:
        METRICS[name]
    return {key_of(name.format(**parts)): float(value) for name, value in values.items() if value is not None}


def label(name: str) -> str:
    """What a report calls a metric: its meaning and its unit."""
    metric = METRICS[name]
    return metric.meaning if metric.unit in ("", "share") else f"{metric.meaning} ({metric.unit})"


def block_metrics(report: BlockReport) -> dict[str, float]:
    """MLflow metrics of one entry of run.json's `blocks`; the step is the block. Peak memory in MB (1e6 bytes)."""
    values: dict[str, float] = {}
    for unit in report.get("units", ()):
        errors = {"{unit}/error_before": unit.get("error_before"), "{unit}/error_after": unit.get("error_after")}
        values |= named(errors, unit=unit["name"])
    return values | named(
        {
            "block/sparsity": report.get("sparsity"),
            "block/seconds": sum(report.get("seconds", {}).values()),
            "block/tokens_per_second": report.get("tokens_per_second"),
            "block/gflops": report.get("gflops"),
            "block/peak_memory_mb": _megabytes(report.get("peak_memory")),
        }
    )


def total_metrics(run: PruneRecord | RetrainRecord) -> dict[str, float]:
    """MLflow metrics of a whole run.json, logged once at the end. Peak memory in MB (1e6 bytes)."""
    alone = ("sparsity", "perplexity", "dense_perplexity", "kl", "loss", "top1_agreement")
    fields: Mapping[str, Any] = run
    values = named({name: fields.get(name) for name in alone})
    for what in ("seconds", "flops"):
        for phase, amount in fields.get(what, {}).items():
            values |= named({f"{what}/{{phase}}": amount}, phase=phase)
    for phase, joules in run.get("energy", {}).items():
        for source, amount in (("cpu", joules["cpu"]), ("gpu", joules["gpu"])):
            values |= named({"joules/{phase}/{source}": amount}, phase=phase, source=source)
    peak = run.get("peak_memory", {})
    for rank, size in enumerate(peak.get("ranks", ())):
        values |= named({"peak_memory_mb/rank{n}": _megabytes(size)}, n=rank)
    largest = max(peak.get("shards", ()), default=None)
    return values | named(
        {"peak_memory_mb/driver": _megabytes(peak.get("driver")), "peak_memory_mb/shard_max": _megabytes(largest)}
    )


def cost_metrics(kind: str, cost: Cost) -> dict[str, float]:
    """MLflow metrics of a kind of work of a whole track."""
    return named({"seconds/{phase}": cost["seconds"], "flops/{phase}": cost["flops"]}, phase=kind)


def _megabytes(size: float | None) -> float | None:
    return None if size is None else size / MB
