"""The tables that commands print, with rich."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from espalier.pipeline.record.mlflow_client import ui_command
from espalier.pipeline.record.run_record import PruneRecord, RetrainRecord
from espalier.pipeline.reports.format import count, duration, nats, percent, perplexity, size

if TYPE_CHECKING:
    from espalier.cluster.connection.jobs import JobState


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position == 0 else "right", no_wrap=True)
    return table


def result_table(run: PruneRecord) -> Group:
    """One finished run: results, the estimate beside the actual memory, where everything is."""
    table = _table("", "dense", "pruned")
    table.add_row("perplexity", perplexity(run["dense_perplexity"]), perplexity(run["perplexity"]))
    if run.get("kl") is not None:
        table.add_row("KL to dense, nats a token", "", nats(run["kl"]))
        table.add_row("top-1 agreement with dense", "", percent(run["top1_agreement"]))
    table.add_row("zeros", "", percent(run["sparsity"]))
    memory = _table("peak memory", "estimated", "measured")
    memory.add_row("driver", size(run["estimate"]["driver"]), size(run["peak_memory"]["driver"]))
    pairs = zip(run["estimate"]["shards"], run["peak_memory"]["shards"], strict=True)
    for index, (estimate, actual) in enumerate(pairs):
        memory.add_row(f"shard {index}", size(estimate["peak"]), size(actual))
    spent = "   ".join(f"{name} {duration(value)}" for name, value in run["seconds"].items())
    return Group(
        table, "", memory, "", spent, "", f"checkpoint  {run['output']}",
        f"report      {Path(run['output']) / 'espalier' / 'report.md'}",
        f"compare     espalier compare {run['config']['experiment']}   or   {ui_command(run['tracking_uri'])}",
    )  # fmt: skip


def evaluation_table(result: Mapping[str, Any]) -> Table:
    table = _table("model", "perplexity", "zeros", "tokens")
    table.add_row(
        str(result["model"]), perplexity(result["perplexity"]), percent(result["sparsity"]), f"{result['tokens']:,}"
    )
    if "against" in result:
        table.add_row(str(result["against"]), perplexity(result["against_perplexity"]), "", f"{result['tokens']:,}")
        table.add_row("gap in nats a token", f"{result['log_perplexity_gap']:+.4f}", "", "")
        table.add_row("KL in nats a token", nats(result["kl"]), "", "")
        table.add_row("top-1 agreement", percent(result["top1_agreement"]), "", "")
    return table


def plan_table(result: Mapping[str, Any]) -> Group:
    """Shards, bytes and whether they fit."""
    model = result["model"]
    head = (
        f"{model['path']}: {model['family']}, {count(model['parameters'])} parameters in {model['blocks']} "
        f"blocks, {size(model['bytes'])} in {model['dtype']}, computed in "
        f"{result['compute']}; {result['recipe']}, {result['tokens']:,} calibration tokens"
    )
    table = _table(
        "shard",
        "blocks",
        "weights",
        "reconstruction",
        "activations",
        "on disk",
        "estimated peak",
        f"of {size(result['memory_per_shard'])}",
    )
    for shard in result["shards"]:
        table.add_row(
            str(shard["index"]),
            f"{shard['first']}-{shard['last']}",
            *(size(shard[name]) for name in ("weights", "training", "spool_memory", "spool_disk", "peak")),
            f"{100 * shard['peak'] / max(result['memory_per_shard'], 1):.0f} %",
        )
    last = f"resident: {result['resident']}   scratch disk: {size(result['disk'])}"
    return Group(head, *(f"warning: {remark}" for remark in result["remarks"]), "", table, "", last)


def demo_tables(result: Mapping[str, Any]) -> Group:
    """The demo's one table, then where things are."""
    table = _table("recipe", "perplexity", "zeros", "time", "peak memory")
    for row in result["rows"]:
        table.add_row(
            row["recipe"],
            perplexity(row["perplexity"]),
            percent(row["sparsity"]),
            duration(row["seconds"]),
            size(row["peak_memory"]),
        )
    return Group(
        table, "",
        f"The last recipe recovered {100 * result['recovered']:.0f} % of the log-perplexity that Wanda alone lost.", "",
        f"The best checkpoint:  {result['checkpoint']}   (loads with transformers; exact zeros)",
        f"Its report:           {result['report']}",
        f"Compare the runs:     espalier compare {result['experiment']}",
        f"Look at them:         {ui_command(result['tracking_uri'])}",
    )  # fmt: skip


def job_table(jobs: Sequence["JobState"]) -> Group:
    """A job in a few lines: which, how it is doing and what Ray says of it, what it runs. The newest first."""
    lines = []
    for job in jobs:
        lasted = f", {duration(job.seconds)}" if job.seconds is not None else ""
        code = f", exit code {job.exit_code}" if job.exit_code is not None else ""
        begun = f", begun {job.started}" if job.started else ""
        lines += [Text(f"{job.id}  {job.status}{code}{begun}{lasted}", style="bold")]
        lines += [Text(f"    {line}") for line in (job.command, job.message) if line]
    return Group(*(lines or [Text("no jobs")]))


def training_table(run: RetrainRecord) -> Group:
    """One finished training run: the curve's ends, what each rank held, where everything is."""
    from espalier.stages.metrics.perplexity import perplexity_of

    table = _table("after step", "loss", "perplexity")
    for step, loss in run["evaluations"]:
        table.add_row(str(step), f"{loss:.4f}", perplexity(perplexity_of(loss)))
    tracked = any("shadow" in held for held in run["memory"])
    memory = _table(
        "rank", "parameters", "optimizer state", *(["shadow"] if tracked else []), "estimated peak", "measured peak"
    )
    peaks = zip(run["memory"], run["estimate"]["ranks"], run["peak_memory"]["ranks"], strict=True)
    for rank, (held, expected, peak) in enumerate(peaks):
        memory.add_row(str(rank), *map(size, held.values()), size(expected["peak"]), size(peak))
    spent = f"{run['tokens']:,} tokens in {duration(run['seconds']['steps'])}"
    speed = f", {run['tokens_per_second']:,.0f} a second" if run["tokens_per_second"] else ""
    curve: list[Table | str] = [table, ""] if run["evaluations"] else []
    return Group(
        *curve, memory, "", f"{spent}{speed}", "",
        f"checkpoint  {run['output']}",
        f"report      {run['report']}",
        f"compare     espalier compare {run['config']['experiment']}   or   {ui_command(run['tracking_uri'])}",
    )  # fmt: skip
