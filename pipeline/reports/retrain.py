"""report.md of a training run and its picture, from the dictionary that run.json holds."""

from collections.abc import Sequence
from pathlib import Path

from espalier.cluster.connection.redact import storable
from espalier.pipeline.record.run_record import RetrainRecord
from espalier.pipeline.reports.figures import draw_losses
from espalier.pipeline.reports.format import count, duration, number, perplexity, size, table
from espalier.pipeline.reports.sections import loading, recipe, surroundings, times, warnings
from espalier.stages.metrics.perplexity import perplexity_of
from espalier.stages.storage.files import write_text

HELD = {"parameters": "parameters", "optimizer": "optimizer state", "shadow": "shadow"}


def write_report(run: RetrainRecord, losses: Sequence[float], directory: Path) -> list[Path]:
    """report.md and losses.png in `directory`, as the list of those written; `losses` are those of every step."""
    run = storable(run)
    picture = draw_losses(losses, run["evaluations"], directory / "losses.png")
    sections = [
        f"# {run['model']['family']} trained",
        sentence(run),
        warnings(run),
        "## Results\n\n" + _evaluations(run) if run["evaluations"] else "",
        f"![Loss of every step, and on the evaluation text]({picture.name})",
        "## Time\n\n" + times(run),
        "## Memory of each rank\n\n" + _memory(run),
        "## Load it\n\n" + loading(run),
        "## Do it again\n\n" + recipe(run),
        "## Where it ran\n\n" + surroundings(run),
    ]
    report = directory / "report.md"
    write_text(report, "\n\n".join(section for section in sections if section) + "\n")
    return [report, picture]


def sentence(run: RetrainRecord) -> str:
    """The model, how it was trained, and what came out."""
    config, model = run["config"], run["model"]
    held = ", its zeros held" if config["masked"] or config["mask"] else ""
    text = (
        f"`{model['path']}` ({model['blocks']} blocks, {count(model['parameters'])} parameters) was trained in "
        f"{model['dtype']} for {run['steps']:,} steps on {run['tokens']:,} tokens{held}, under ZeRO "
        f"stage {config['zero_stage']}{' with offload' * config['offload']} on {run['ranks']} "
        f"rank{'s' * (run['ranks'] != 1)}, in {duration(run['seconds']['steps'])}"
    )
    if run["loss"] is not None:
        text += f": loss {number(run['loss'])} nats a token, perplexity {perplexity(run['perplexity'])}"
    return text + ". Times and operations are those since the run was last resumed."


def _evaluations(run: RetrainRecord) -> str:
    rows = [[f"{step:,}", f"{loss:.4f}", perplexity(perplexity_of(loss))] for step, loss in run["evaluations"]]
    return table(["after step", "loss (nats a token)", "perplexity"], rows)


def _memory(run: RetrainRecord) -> str:
    named = {name: title for name, title in HELD.items() if any(name in held for held in run["memory"])}
    rows = [
        [str(rank), *(size(held.get(name)) for name in named), size(expected["peak"]), size(peak)]
        for rank, (held, expected, peak) in enumerate(
            zip(run["memory"], run["estimate"]["ranks"], run["peak_memory"]["ranks"], strict=True)
        )
    ]
    return table(["rank", *named.values(), "estimated peak", "measured peak"], rows)
