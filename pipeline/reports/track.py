"""What an experiment of `espalier track` found: report.md with its curve, and the same table for a terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Group, JustifyMethod
from rich.table import Table

from espalier.cluster.connection.redact import storable
from espalier.pipeline.record.mlflow_client import ui_command
from espalier.pipeline.record.run_record import Cost, TrackRecord
from espalier.pipeline.reports.figures import draw_track
from espalier.pipeline.reports.format import count, duration, number, operations, percent, plain, table
from espalier.stages.metrics.energy import described
from espalier.stages.storage.files import write_text

SAME_SPARSITY = 0.015  # a published point this near, in shares, is shown in the row


def write_report(run: TrackRecord, directory: Path) -> list[Path]:
    """report.md and curve.png in `directory`, from what run.json holds."""
    run = storable(run)
    config, model = run["config"], run["model"]
    picture = draw_track(run["points"], run["trained"], run["beside"], directory / "curve.png", metric=run["metric"])
    header, rows = cells(run)
    sections = [
        f"# {model['family']} tracked, pruned and fine-tuned",
        sentence(run),
        table(header, rows),
        f"![{run['metric']} against sparsity]({picture.name})",
        "## What it took\n\n" + table(*costs(run)),
        "## Do it again\n\n```yaml\n" + _recipe(config) + "```",
    ]
    report = directory / "report.md"
    write_text(report, "\n\n".join(sections) + "\n")
    return [report, picture]


def sentence(run: TrackRecord) -> str:
    """The model, how it was tracked, and what came out."""
    config, model, points = run["config"], run["model"], run["points"]
    best = min(points, key=lambda point: point["tuned"])
    kept = "its last weights" if config["score"] == "final" else f"a {config['shadow_schedule']} shadow"
    return (
        f"{count(model['parameters'])} parameters in {model['blocks']} blocks, trained for {config['steps']:,} steps "
        f"to a {run['metric']} of {number(run['trained'])} {run['unit']}; pruned by {kept} at {len(points)} "
        f"thresholds, each fine-tuned for {points[0]['steps']:,} steps, in {duration(run['seconds'])} in all. "
        f"Lowest: {number(best['tuned'])} at {percent(best['sparsity'])} zeros."
    )


def cells(run: TrackRecord) -> tuple[list[str], list[list[str]]]:
    """(header, rows): a row for each threshold, with what others published at its sparsity."""
    beside = run["beside"]
    header = ["zeros", "rate", f"{run['metric']}, pruned", "fine-tuned", "against trained", *beside, "time"]
    rows = [
        [
            percent(point["sparsity"]),
            f"{point['rate']:.3f}",
            _figure(point["pruned"]),
            _figure(point["tuned"]),
            f"{point['tuned'] - run['trained']:+.3f}",
            *(_figure(_near(curve, point["sparsity"])) for curve in beside.values()),
            duration(point["seconds"]),
        ]
        for point in run["points"]
    ]
    return header, rows


def costs(run: TrackRecord) -> tuple[list[str], list[list[str]]]:
    """(header, rows): a row for each kind of work. The machine's joules while training are those of tracking, too."""
    header = ["work", "time", "energy of the machine", "floating-point operations"]
    rows = [
        [kind, duration(cost["seconds"]), _energy(kind, cost), operations(cost["flops"])]
        for kind, cost in run["cost"].items()
    ]
    return header, rows


def _energy(kind: str, cost: Cost) -> str:
    return "with dense training" if kind == "tracking" else described(cost["energy"])


def track_table(run: TrackRecord) -> Group:
    """The finished experiment on a terminal."""
    return Group(
        sentence(run), "", _shown(*cells(run), "right"), "", _shown(*costs(run), "left"), "",
        f"curve       {run['picture']}",
        f"report      {run['report']}",
        f"runs        {ui_command(run['tracking_uri'])}   (experiment {run['config']['experiment']})",
    )  # fmt: skip


def _shown(header: list[str], rows: list[list[str]], justify: JustifyMethod) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in header:
        shown.add_column(name, justify=justify)
    for row in rows:
        shown.add_row(*row)
    return shown


def _figure(value: float | None) -> str:
    """Three places, as losses are published; large figures to four digits."""
    return number(value) if value is None or not abs(value) < 100 else f"{value:.3f}"


def _near(curve: list[tuple[float, float]], sparsity: float) -> float | None:
    distance, value = min((abs(x - sparsity), y) for x, y in curve)
    return value if distance < SAME_SPARSITY else None


def _recipe(config: Mapping[str, Any]) -> str:
    """The resolved recipe as YAML for `espalier track FILE.yaml`."""
    given = {name: value for name, value in config.items() if value not in (None, {}) and name != "output"}
    return yaml.safe_dump(plain(given), sort_keys=False, width=100)
