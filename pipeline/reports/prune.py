"""report.md and its two pictures: what a run did, from the dictionary that run.json holds."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from espalier.cluster.connection.redact import storable
from espalier.pipeline.record.metric_names import label
from espalier.pipeline.record.run_record import ModelRecord, PruneRecord
from espalier.pipeline.reports.figures import component_title, draw_errors, draw_timeline, unit_names
from espalier.pipeline.reports.format import (
    count,
    duration,
    nats,
    number,
    percent,
    perplexity,
    size,
    table,
    target_share,
)
from espalier.pipeline.reports.sections import loading, recipe, surroundings, times, warnings
from espalier.stages.block_report import BlockReport, UnitReport
from espalier.stages.reconstruction.units import UNITS
from espalier.stages.storage.files import write_text

ESTIMATE_PARTS = {
    "weights": "weights",
    "training": "reconstruction",
    "spool_memory": "activations",
    "spool_disk": "activations on disk",
}


def write_report(run: PruneRecord, directory: Path) -> list[Path]:
    """report.md, errors.png and timeline.png in `directory`, as the list of those written.

    There is no errors.png where no unit was reconstructed, for then no error was measured.
    """
    run = storable(run)
    directory.mkdir(parents=True, exist_ok=True)
    pictures = {
        "Error of each reconstructed unit, by block": draw_errors(run["blocks"], directory / "errors.png"),
        "What each shard did, over time": draw_timeline(run.get("timeline", ()), directory / "timeline.png"),
    }
    made = {title: path for title, path in pictures.items() if path is not None}
    report = directory / "report.md"
    sections = [
        f"# {_what(run['model'], run['model'].get('family', 'model'))} pruned to {percent(run.get('sparsity'))} zeros",
        sentence(run),
        warnings(run),
        "## Results\n\n" + _results(run),
        "## Time\n\n" + times(run),
        "## Memory\n\n" + _memory(run),
        "## Blocks\n\n" + _blocks(run),
        *(f"![{title}]({path.name})" for title, path in made.items()),
        "## Load it\n\n" + loading(run),
        "## Do it again\n\n" + recipe(run),
        "## Where it ran\n\n" + surroundings(run),
    ]
    write_text(report, "\n\n".join(section for section in sections if section) + "\n")
    return [report, *made.values()]


def sentence(run: PruneRecord) -> str:
    """One sentence: the model, what was done to it, where, for how long, and what it cost in perplexity."""
    config, model = run.get("config", {}), run["model"]
    target = config.get("pattern") or target_share(config.get("sparsity", run.get("sparsity", 0.0)))
    if config.get("threshold") is not None:
        target = f"what scores above {config['threshold']:g} σ of its matrix"
    reconstructed = config.get("reconstruct") or "none"
    refined = config.get("refine") or "none"
    shards = run.get("shards", ())
    text = (
        f"{_what(model, '`{path}`'.format(**model))} ({model['blocks']} blocks, "
        f"{count(model.get('parameters'))} parameters, {count(model.get('prunable'))} of them prunable) was pruned to "
        f"{target} by {config.get('criterion', '?')}"
    )
    if refined != "none":
        text += f", its masks refined by {refined}"
    if reconstructed != "none":
        text += (
            f" and reconstructed {_unit_of_reconstruction(reconstructed)} from {config.get('inputs', 'dense')} inputs"
        )
    if run.get("compute"):
        text += f", computed in {run['compute']}"
    text += f", on {len(shards)} shard{'s' * (len(shards) != 1)}, in {duration(run.get('seconds', {}).get('total'))}"
    dense, pruned = run.get("dense_perplexity"), run.get("perplexity")
    if pruned is not None:
        text += f": perplexity {perplexity(pruned)}"
        text += f", where the dense model has {perplexity(dense)}" if dense is not None else ""
    return text + "."


def _what(model: ModelRecord, name: str) -> str:
    return f"The vision tower of {name}" if model.get("tower") == "vision" else name


def _unit_of_reconstruction(reconstructed: str) -> str:
    kind, _, size = str(reconstructed).partition(":")
    return UNITS[kind].title.format(blocks=size) if kind in UNITS else str(reconstructed)


def _results(run: PruneRecord) -> str:
    dense, pruned = run.get("dense_perplexity"), run.get("perplexity")
    rows = [["perplexity", perplexity(dense), perplexity(pruned)]]
    if dense and pruned and dense > 0 and pruned > 0:
        rows.append(["log-perplexity (nats a token)", nats(math.log(dense)), nats(math.log(pruned))])
    if run.get("kl") is not None:
        rows.append([label("kl"), "", nats(run["kl"])])
        rows.append([label("top1_agreement"), "", percent(run.get("top1_agreement"))])
    zeros, weights = _zeros(run)
    counted = f" ({zeros:,} of {weights:,})" if weights else ""
    rows.append([label("sparsity"), "", percent(run.get("sparsity")) + counted])
    return table(["", "dense", "pruned"], rows)


def _zeros(run: PruneRecord) -> tuple[int, int]:
    layers = [layer for block in run["blocks"] for layer in block.get("layers", {}).values()]
    return sum(layer["zeros"] for layer in layers), sum(layer["weights"] for layer in layers)


def _memory(run: PruneRecord) -> str:
    estimate, peak = run.get("estimate", {}), run.get("peak_memory", {})
    rows = [_memory_row("driver", {"peak": estimate.get("driver")}, peak.get("driver"))]
    expected, measured = list(estimate.get("shards", ())), list(peak.get("shards", ()))
    for index in range(max(len(expected), len(measured))):
        parts = expected[index] if index < len(expected) else {}
        rows.append(_memory_row(f"shard {index}", parts, measured[index] if index < len(measured) else None))
    return table(["process", "estimated peak", "measured peak", "measured / estimated", "parts of the estimate"], rows)


def _memory_row(name: str, parts: Mapping[str, Any], measured: float | None) -> list[str]:
    peak = parts.get("peak")
    ratio = f"{measured / peak:.2f}" if measured and peak else "–"
    named = [f"{label} {size(parts[part])}" for part, label in ESTIMATE_PARTS.items() if parts.get(part)]
    return [name, size(peak), size(measured), ratio, ", ".join(named)]


def _blocks(run: PruneRecord) -> str:
    blocks = run["blocks"]
    names = unit_names(blocks)
    header = ["block", "shard", "zeros", *(f"{component_title(name)} error" for name in names)]
    header += ["time", "tokens/s", "GFLOP/s", "peak memory"]
    rows = [_block_row(block, names) for block in blocks]
    explained = (
        "Errors are relative squared errors against the dense unit, ‖f̃(x) − f(x)‖² / ‖f(x)‖², on the eighth of the "
        "calibration held out from reconstruction: as pruned → as reconstructed. *Kept*: reconstruction did not "
        "lower the error, so the weights stayed as pruned.\n\n"
    )
    return (explained if names else "Nothing was reconstructed, so no errors were measured.\n\n") + table(header, rows)


def _block_row(block: BlockReport, names: Sequence[str]) -> list[str]:
    units = {unit["name"]: unit for unit in block.get("units", ())}
    return [
        str(block["block"]),
        str(block["shard"]),
        percent(block.get("sparsity")),
        *(_error_cell(units.get(name)) for name in names),
        duration(sum(block.get("seconds", {}).values())),
        number(block.get("tokens_per_second"), digits=5),
        number(block.get("gflops")),
        size(block.get("peak_memory")),
    ]


def _error_cell(unit: UnitReport | None) -> str:
    if unit is None or unit.get("error_before") is None:
        return "–"
    if not unit.get("improved", True):
        return f"{number(unit['error_before'], 3)} *kept*"
    return f"{number(unit['error_before'], 3)} → {number(unit.get('error_after'), 3)}"
