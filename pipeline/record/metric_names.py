"""The metrics of run.json that are logged to MLflow, and their names."""

from collections.abc import Mapping
from typing import Any

from espalier.pipeline.record.mlflow_client import key_of

MB = 1e6
COMPUTE_TAG = "espalier.compute"  # an MLflow tag: fp32, bf16 or fp16, what a run turned out to be computed in


def block_metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """MLflow metrics of one entry of run.json's `blocks`; the step is the block. Peak memory in MB (1e6 bytes)."""
    values = {
        f"{unit['name']}/{which}": unit.get(which)
        for unit in report.get("units", ())
        for which in ("error_before", "error_after")
    }
    values["block/sparsity"] = report.get("sparsity")
    values["block/seconds"] = sum(report.get("seconds", {}).values())
    values["block/tokens_per_second"] = report.get("tokens_per_second")
    values["block/gflops"] = report.get("gflops")
    values["block/peak_memory_mb"] = _megabytes(report.get("peak_memory"))
    return _present(values)


def total_metrics(run: Mapping[str, Any]) -> dict[str, float]:
    """MLflow metrics of a whole run.json, logged once at the end. Peak memory in MB (1e6 bytes)."""
    values = {name: run.get(name) for name in ("sparsity", "perplexity", "dense_perplexity", "kl", "top1_agreement")}
    values |= {f"seconds/{phase}": seconds for phase, seconds in run.get("seconds", {}).items()}
    values |= {f"flops/{phase}": flops for phase, flops in run.get("flops", {}).items()}
    for phase, joules in run.get("energy", {}).items():
        values |= {f"joules/{phase}/{source}": value for source, value in joules.items()}
    peak = run.get("peak_memory", {})
    values["peak_memory_mb/driver"] = _megabytes(peak.get("driver"))
    values["peak_memory_mb/shard_max"] = _megabytes(max(peak.get("shards") or [None]))
    return _present(values)


def _present(values: Mapping[str, Any]) -> dict[str, float]:
    return {key_of(name): float(value) for name, value in values.items() if value is not None}


def _megabytes(size: float | None) -> float | None:
    return None if size is None else size / MB
