"""The tables that commands print, with rich."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from espalier.pipeline.record.mlflow_client import ui_command
from espalier.pipeline.reports.format import human_seconds


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position == 0 else "right", no_wrap=True)
    return table


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB" if count < 10e9 else f"{count / 1e9:,.1f} GB"


def perplexity(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"


def result_table(run: Mapping[str, Any]) -> Group:
    """One finished run: results, the estimate beside the actual memory, where everything is."""
    table = _table("", "dense", "pruned")
    table.add_row("perplexity", perplexity(run["dense_perplexity"]), perplexity(run["perplexity"]))
    if run.get("kl") is not None:
        table.add_row("KL to dense, nats a token", "", f"{run['kl']:.4f}")
        table.add_row("same first choice as dense", "", f"{run['top1_agreement']:.2%}")
    table.add_row("sparsity", "", f"{run['sparsity']:.4%}")
    memory = _table("memory", "estimate", "actual")
    memory.add_row("driver, at most", megabytes(run["estimate"]["driver"]), megabytes(run["peak_memory"]["driver"]))
    pairs = zip(run["estimate"]["shards"], run["peak_memory"]["shards"], strict=True)
    for index, (estimate, actual) in enumerate(pairs):
        memory.add_row(f"shard {index}", megabytes(estimate["peak"]), megabytes(actual))
    spent = "   ".join(f"{name} {human_seconds(value)}" for name, value in run["seconds"].items())
    return Group(
        table, "", memory, "", spent, "", f"checkpoint  {run['output']}",
        f"report      {Path(run['output']) / 'espalier' / 'report.md'}",
        f"compare     espalier compare {run['config']['experiment']}   or   {ui_command(run['tracking_uri'])}",
    )  # fmt: skip


def evaluation_table(result: Mapping[str, Any]) -> Table:
    table = _table("model", "perplexity", "sparsity", "tokens")
    table.add_row(
        str(result["model"]), perplexity(result["perplexity"]), f"{result['sparsity']:.4%}", f"{result['tokens']:,}"
    )
    if "against" in result:
        table.add_row(str(result["against"]), perplexity(result["against_perplexity"]), "", f"{result['tokens']:,}")
        table.add_row("gap in nats a token", f"{result['log_perplexity_gap']:+.4f}", "", "")
        table.add_row("KL in nats a token", f"{result['kl']:.4f}", "", "")
        table.add_row("same first choice", f"{result['top1_agreement']:.2%}", "", "")
    return table


def plan_table(result: Mapping[str, Any]) -> Group:
    """Shards, bytes and whether they fit."""
    model = result["model"]
    head = (
        f"{model['path']}: {model['family']}, {model['parameters'] / 1e9:,.2f} G parameters in {model['blocks']} "
        f"blocks, {megabytes(model['bytes'])} in {model['dtype']}, computed in "
        f"{result['compute']}; {result['tokens']:,} calibration tokens"
    )
    table = _table(
        "shard",
        "blocks",
        "weights",
        "fitting",
        "activations",
        "on disk",
        "peak",
        f"of {megabytes(result['memory_per_shard'])}",
    )
    for shard in result["shards"]:
        table.add_row(
            str(shard["index"]),
            f"{shard['first']}-{shard['last']}",
            *(megabytes(shard[name]) for name in ("weights", "training", "spool_memory", "spool_disk", "peak")),
            f"{shard['peak'] / max(result['memory_per_shard'], 1):.0%}",
        )
    last = f"resident: {result['resident']}   scratch disk: {megabytes(result['disk'])}"
    return Group(head, *(f"warning: {remark}" for remark in result["remarks"]), "", table, "", last)


def demo_tables(result: Mapping[str, Any]) -> Group:
    """The demo's one table, then where things are."""
    table = _table("recipe", "perplexity", "sparsity", "seconds", "peak memory")
    for row in result["rows"]:
        table.add_row(
            row["recipe"],
            perplexity(row["perplexity"]),
            f"{row['sparsity']:.2%}",
            f"{row['seconds']:.1f}",
            megabytes(row["peak_memory"]),
        )
    return Group(
        table, "",
        f"Reconstruction recovered {result['recovered']:.0%} of the log-perplexity that Wanda alone lost.", "",
        f"The best checkpoint:  {result['checkpoint']}   (loads with transformers; exact zeros)",
        f"Its report:           {result['report']}",
        f"Compare the runs:     espalier compare {result['experiment']}",
        f"Look at them:         {ui_command(result['tracking_uri'])}",
    )  # fmt: skip


def training_table(run: Mapping[str, Any]) -> Group:
    """One finished training run: the curve's ends, what each rank held, where everything is."""
    from espalier.stages.metrics.perplexity import perplexity_of

    table = _table("after step", "loss", "perplexity")
    for step, loss in run["evaluations"]:
        table.add_row(str(step), f"{loss:.4f}", perplexity(perplexity_of(loss)))
    tracked = any("shadow" in held for held in run["memory"])
    memory = _table(
        "rank", "parameters", "optimizer state", *(["shadow"] if tracked else []), "estimate", "peak memory"
    )
    peaks = zip(run["memory"], run["estimate"]["ranks"], run["peak_memory"]["ranks"], strict=True)
    for rank, (held, expected, peak) in enumerate(peaks):
        memory.add_row(str(rank), *map(megabytes, held.values()), megabytes(expected["peak"]), megabytes(peak))
    spent = f"{run['tokens']:,} tokens in {human_seconds(run['seconds']['steps'])}"
    speed = f", {run['tokens_per_second']:,.0f} a second" if run["tokens_per_second"] else ""
    curve: list[Table | str] = [table, ""] if run["evaluations"] else []
    return Group(
        *curve, memory, "", f"{spent}{speed}", "",
        f"checkpoint  {run['output']}",
        f"report      {run['report']}",
        f"compare     espalier compare {run['config']['experiment']}   or   {ui_command(run['tracking_uri'])}",
    )  # fmt: skip
