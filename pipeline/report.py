"""report.md and its two pictures: what a run did, from the dictionary that run.json holds."""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.redact import storable
from pipeline.figures import component_title, draw_errors, draw_timeline, unit_names
from stages.energy import described
from stages.files import write_text

PHASES = {
    "plan": "plan",
    "tokens": "tokenise",
    "connect": "connect to Ray",
    "load": "start the shards and load their blocks",
    "stream": "stream the calibration through the shards",
    "work": "score, mask and rebuild",
    "train": "train: the ranks' models, steps, evaluations, checkpoints",
    "steps": "of this, optimizer steps",
    "track": "of these, the shadow",
    "assemble": "assemble and verify the checkpoint",
    "evaluate_dense": "evaluate the dense model",
    "evaluate": "evaluate the pruned model",
    "total": "**total**",
}
ESTIMATE_PARTS = {"weights": "weights", "spool_memory": "spool", "spool_disk": "spool on disk", "training": "training"}


def write_report(run: Mapping[str, Any], directory: Path) -> list[Path]:
    """report.md, errors.png and timeline.png in `directory`, as the list of those written.

    There is no errors.png where no unit was rebuilt, for then no error was measured.
    """
    run = storable(run)
    directory.mkdir(parents=True, exist_ok=True)
    pictures = {
        "Error of each rebuilt unit, by block": draw_errors(run["blocks"], directory / "errors.png"),
        "What each shard did, over time": draw_timeline(run.get("timeline", ()), directory / "timeline.png"),
    }
    drawn = {title: path for title, path in pictures.items() if path is not None}
    report = directory / "report.md"
    sections = [
        f"# {_what(run['model'], run['model'].get('family', 'model'))} pruned to {percent(run.get('sparsity'))} zeros",
        sentence(run),
        warnings(run),
        "## Results\n\n" + _results(run),
        "## Time\n\n" + times(run),
        "## Memory: estimate and actual\n\n" + _memory(run),
        "## Blocks\n\n" + _blocks(run),
        *(f"![{title}]({path.name})" for title, path in drawn.items()),
        "## Load it\n\n" + loading(run),
        "## Do it again\n\n" + recipe(run),
        "## Where it ran\n\n" + surroundings(run),
    ]
    write_text(report, "\n\n".join(section for section in sections if section) + "\n")
    return [report, *drawn.values()]


def sentence(run: Mapping[str, Any]) -> str:
    """One sentence: the model, what was done to it, where, for how long, and what it cost in perplexity."""
    config, model = run.get("config", {}), run["model"]
    target = config.get("pattern") or percent(config.get("sparsity", run.get("sparsity")))
    if config.get("threshold") is not None:
        target = f"what scores above {config['threshold']:g} σ of its matrix"
    rebuilt = config.get("reconstruct") or "none"
    refined = config.get("refine") or "none"
    shards = run.get("shards", ())
    text = (
        f"{_what(model, '`{path}`'.format(**model))} ({model['blocks']} blocks, "
        f"{count(model.get('parameters'))} parameters, {count(model.get('prunable'))} of them prunable) was pruned to "
        f"{target} by {config.get('criterion', '?')}"
    )
    if refined != "none":
        text += f", its masks refined by {refined}"
    if rebuilt != "none":
        text += f" and rebuilt {_unit_of_reconstruction(rebuilt)} from {config.get('inputs', 'dense')} inputs"
    if run.get("compute"):
        text += f", computed in {run['compute']}"
    text += f", on {len(shards)} shard{'s' * (len(shards) != 1)}, in {duration(run.get('seconds', {}).get('total'))}"
    dense, pruned = run.get("dense_perplexity"), run.get("perplexity")
    if pruned is not None:
        text += f": perplexity {number(pruned)}"
        text += f", where the dense model has {number(dense)}" if dense is not None else ""
    return text + "."


def _what(model: Mapping[str, Any], name: str) -> str:
    return f"The vision tower of {name}" if model.get("tower") == "vision" else name


def _unit_of_reconstruction(rebuilt: str) -> str:
    kind, _, size = str(rebuilt).partition(":")
    named = {"component": "component by component", "matrix": "matrix by matrix", "block": "block by block"}
    return named.get(kind, f"{size or 'some'} blocks at a time" if kind == "window" else str(rebuilt))


def warnings(run: Mapping[str, Any]) -> str:
    return "\n".join(f"> **Warning.** {warning}\n>" for warning in run.get("warnings", ())).removesuffix("\n>")


def _results(run: Mapping[str, Any]) -> str:
    dense, pruned = run.get("dense_perplexity"), run.get("perplexity")
    rows = [["perplexity", number(dense), number(pruned)]]
    if dense and pruned and dense > 0 and pruned > 0:
        rows.append(["log-perplexity (nats per token)", number(math.log(dense)), number(math.log(pruned))])
    if run.get("kl") is not None:
        rows.append(["KL(dense ‖ pruned) (nats per token)", "", number(run["kl"])])
        rows.append(["most likely token the same as the dense model's", "", percent(run.get("top1_agreement"), 2)])
    zeros, weights = _zeros(run)
    counted = f" ({zeros:,} of {weights:,})" if weights else ""
    rows.append(["zeros among the prunable weights", "", percent(run.get("sparsity"), places=2) + counted])
    return table(["", "dense", "pruned"], rows)


def _zeros(run: Mapping[str, Any]) -> tuple[int, int]:
    layers = [layer for block in run["blocks"] for layer in block.get("layers", {}).values()]
    return sum(layer["zeros"] for layer in layers), sum(layer["weights"] for layer in layers)


def times(run: Mapping[str, Any]) -> str:
    seconds = run.get("seconds", {})
    order = [*(phase for phase in PHASES if phase in seconds and phase != "total"), *(seconds.keys() - PHASES.keys())]
    energy, flops = run.get("energy", {}), run.get("flops", {})
    rows = [
        [PHASES.get(phase, phase), duration(seconds[phase]), described(energy.get(phase)), operations(flops.get(phase))]
        for phase in [*order, "total"]
        if phase in seconds
    ]
    return table(["phase", "time", "energy of the machine", "floating-point operations"], rows)


def _memory(run: Mapping[str, Any]) -> str:
    estimate, peak = run.get("estimate", {}), run.get("peak_memory", {})
    rows = [_memory_row("driver", {"peak": estimate.get("driver")}, peak.get("driver"))]
    expected, measured = list(estimate.get("shards", ())), list(peak.get("shards", ()))
    for index in range(max(len(expected), len(measured))):
        parts = expected[index] if index < len(expected) else {}
        rows.append(_memory_row(f"shard {index}", parts, measured[index] if index < len(measured) else None))
    return table(["process", "estimated peak", "measured peak", "measured / estimated", "of the estimate"], rows)


def _memory_row(name: str, parts: Mapping[str, Any], measured: float | None) -> list[str]:
    peak = parts.get("peak")
    ratio = f"{measured / peak:.2f}" if measured and peak else "–"
    named = [f"{label} {size(parts[part])}" for part, label in ESTIMATE_PARTS.items() if parts.get(part)]
    return [name, size(peak), size(measured), ratio, ", ".join(named)]


def _blocks(run: Mapping[str, Any]) -> str:
    blocks = run["blocks"]
    names = unit_names(blocks)
    header = ["block", "shard", "zeros", *(f"{component_title(name)} error" for name in names)]
    header += ["time", "tokens/s", "GFLOP/s", "peak memory"]
    rows = [_block_row(block, names) for block in blocks]
    explained = (
        "Errors are relative squared errors against the dense unit, ‖f̃(x) − f(x)‖² / ‖f(x)‖², on the eighth of the "
        "calibration held out from rebuilding: as pruned → as rebuilt. *Kept*: rebuilding did not lower the error, so "
        "the weights stayed as pruned.\n\n"
    )
    return (explained if names else "Nothing was rebuilt, so no errors were measured.\n\n") + table(header, rows)


def _block_row(block: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    units = {unit["name"]: unit for unit in block.get("units", ())}
    return [
        str(block["block"]),
        str(block["shard"]),
        percent(block.get("sparsity"), places=2),
        *(_error_cell(units.get(name)) for name in names),
        duration(sum(block.get("seconds", {}).values())),
        number(block.get("tokens_per_second"), digits=5),
        number(block.get("gflops")),
        size(block.get("peak_memory")),
    ]


def _error_cell(unit: Mapping[str, Any] | None) -> str:
    if unit is None or unit.get("error_before") is None:
        return "–"
    if not unit.get("improved", True):
        return f"{number(unit['error_before'], 3)} *kept*"
    return f"{number(unit['error_before'], 3)} → {number(unit.get('error_after'), 3)}"


def loading(run: Mapping[str, Any]) -> str:
    output = str(run["output"])
    opening = f"A plain checkpoint{' with exact zeros' if run.get('sparsity') else ''}:\n\n```python\n"
    if run["model"].get("images"):
        return (
            f"{opening}"
            "from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
            f"model = AutoModelForImageTextToText.from_pretrained({output!r}, dtype='auto')\n"
            f"processor = AutoProcessor.from_pretrained({output!r})\n```"
        )
    return (
        f"{opening}"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({output!r}, dtype='auto')\n"
        f"tokenizer = AutoTokenizer.from_pretrained({output!r})\n```"
    )


def recipe(run: Mapping[str, Any]) -> str:
    config = {name: value for name, value in run.get("config", {}).items() if value is not None}
    for name in ("model", "output", "config"):  # given on the command line
        config.pop(name, None)
    if "pattern" in config or "threshold" in config:  # they exclude sparsity, and an unused one has a default
        config.pop("sparsity", None)
    if "threshold" in config:
        config.pop("scope", None)
    for name in ("calibration", "data", "eval"):
        if isinstance(config.get(name), (list, tuple)):  # texts or token ids given in Python, possibly millions
            config[name] = f"{name.upper()}_TEXT"
    command = run.get("command", "prune")
    command = "prune" if command in ("resume", "demo") else command
    model = shlex.quote(str(run["model"]["path"]))
    written = yaml.safe_dump(plain(config), sort_keys=False, default_flow_style=False, allow_unicode=True).rstrip()
    return (
        f"Save these lines as `recipe.yaml`:\n\n```yaml\n{written}\n```\n\n```sh\n"
        f"espalier {command} {model} --output NEW_DIRECTORY --config recipe.yaml\n```"
    )


def surroundings(run: Mapping[str, Any]) -> str:
    rows = [
        [f"shard {shard['index']}", f"blocks {shard['first']}–{shard['last']} on {shard['device']}, {shard['node']}"]
        for shard in run.get("shards", ())
    ]
    rows += [["text", read] for read in run.get("read", {}).values() if read]
    hardware = run.get("hardware", {})
    if hardware:
        rows.append(["hardware", f"{hardware['cpus']} CPUs; {', '.join(map(str, hardware['devices']))}"])
    rows += [[name, str(version)] for name, version in run.get("versions", {}).items()]
    rows += [["run", str(run.get("run_id"))], ["MLflow run", str(run.get("mlflow_run_id") or "none")]]
    rows.append(["MLflow", str(run.get("tracking_uri"))])
    return table(["", ""], rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar in a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def plain(value: Any) -> Any:
    """The value as YAML's own types: tuples become lists, paths and the like strings."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    for kind in (int, float):  # pydantic's sizes are a kind of int that YAML does not know
        if isinstance(value, kind) and not isinstance(value, bool):
            return kind(value)
    return value if value is None or isinstance(value, bool) else str(value)


def number(value: float | None, digits: int = 4) -> str:
    """A number to `digits` significant digits, without an exponent where it can be read without one."""
    if value is None:
        return "–"
    if not math.isfinite(value) or value == 0 or 1e-4 <= abs(value) < 1e6:
        return f"{value:,.{digits}g}" if abs(value) < 10**digits or not math.isfinite(value) else f"{value:,.0f}"
    return f"{value:.{digits - 1}e}"


def percent(share: float | None, places: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{places}f} %"


def count(value: int | None) -> str:
    """A count of parameters: 5.12 M."""
    if value is None:
        return "an unknown number of"
    scale, letter = next(((s, u) for s, u in ((1e9, " B"), (1e6, " M"), (1e3, " k")) if value >= s), (1, ""))
    return f"{value / scale:.3g}{letter}"


def operations(value: float | None) -> str:
    """Floating-point operations: 1.2 TFLOP."""
    if not value:
        return ""
    scale, letter = next(((s, u) for s, u in ((1e15, "P"), (1e12, "T"), (1e9, "G")) if value >= s), (1e6, "M"))
    return f"{value / scale:.3g} {letter}FLOP"


def size(value: float | None) -> str:
    """Bytes in decimal units: 1.2 GB."""
    if value is None:
        return "–"
    scale, letter = next(((s, u) for s, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if value >= s), (1, "B"))
    return f"{value / scale:.3g} {letter}" if value < 999.5e9 else f"{value / 1e9:,.0f} GB"


def duration(seconds: float | None) -> str:
    """Seconds as 4.8 s, 2.1 min, or 1 h 03 min."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.3g} s" if seconds < 10 else f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"
