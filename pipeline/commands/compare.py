"""Runs side by side: a table of what MLflow holds of an experiment, and perplexity against sparsity for each recipe."""

import csv
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from espalier.cluster.connection.redact import without_credentials
from espalier.pipeline.record.metric_names import COMPUTE_TAG
from espalier.pipeline.record.mlflow_client import (
    client_errors,
    default_tracking_uri,
    is_final,
    open_client,
    reason,
    sqlite_path,
)
from espalier.pipeline.reports.figures import draw_perplexity
from espalier.pipeline.reports.format import duration, nats, percent, perplexity, size, table, target_share
from espalier.stages.errors import Refusal, nearest
from espalier.stages.storage.files import replacing, write_text

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

PAGE = 1000
# Column -> heading and the way to show it; in the CSV the columns have these names and plain numbers.
COLUMNS: dict[str, tuple[str, Any]] = {
    "run": ("run", str),
    "criterion": ("criterion", str),
    "target": ("target", str),
    "refine": ("refine", str),
    "reconstruct": ("reconstruct", str),
    "inputs": ("inputs", str),
    "epochs": ("epochs", str),
    "compute": ("computed in", str),
    "perplexity": ("perplexity", perplexity),
    "dense_perplexity": ("dense", perplexity),
    "kl": ("KL", nats),
    "top1_agreement": ("top-1", percent),
    "sparsity": ("zeros", percent),
    "seconds": ("time", duration),
    "shard_peak_mb": ("peak", lambda megabytes: size(1e6 * megabytes)),
    "status": ("status", lambda status: status.lower()),
}
NUMERIC = {"perplexity", "dense_perplexity", "kl", "top1_agreement", "sparsity", "seconds", "shard_peak_mb"}
FILE_COLUMNS = [*COLUMNS, "scope", "model", "seed", "run_id"]


@dataclass(frozen=True)
class Comparison:
    """Rows sorted by perplexity, those without one last. `seconds` in s, `shard_peak_mb` in MB, `sparsity` a share."""

    title: str
    rows: list[dict[str, Any]]
    files: list[Path] = field(default_factory=list)

    def table(self) -> Table:
        """For a terminal: the recipe in one column, and none of the columns that say the same for each run."""
        dense = {row["dense_perplexity"] for row in self.rows} - {None}
        title = f"{self.title}: dense perplexity {perplexity(dense.pop())}" if len(dense) == 1 else self.title
        columns = ["target", "perplexity", "dense_perplexity", "kl", "sparsity", "seconds", "shard_peak_mb"]
        if title != self.title:
            columns.remove("dense_perplexity")
        if all(row["kl"] is None for row in self.rows):
            columns.remove("kl")
        computed = {row["compute"] for row in self.rows} - {None}
        if len(computed) > 1:
            columns.insert(1, "compute")
        names = [
            row["run"] + ("" if row["status"] == "FINISHED" else f" ({row['status'].lower()})") for row in self.rows
        ]
        shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        shown.add_column("run", overflow="fold", min_width=min(12, max(map(len, names))))
        shown.add_column("recipe", overflow="fold")
        for column in columns:
            shown.add_column(COLUMNS[column][0], justify="right" if column in NUMERIC else "left", no_wrap=True)
        for name, row in zip(names, self.rows, strict=True):
            recipe_of_any_target = recipe(row | {"pattern": None})
            cells = (name, recipe_of_any_target, *(_cell(row, column) for column in columns))
            shown.add_row(*map(escape, cells), style=None if row["status"] == "FINISHED" else "dim")
        distance = "KL: from the dense model's predictions, in nats a token; " if "kl" in columns else ""
        arithmetic = f"computed in {computed.pop()}; " if len(computed) == 1 else ""
        shown.caption = f"{arithmetic}{distance}peak: memory of the largest shard"
        shown.caption_justify = "left"
        return shown

    def markdown(self) -> str:
        header = [COLUMNS[column][0] for column in self._columns()]
        cells = [[_cell(row, column) for column in self._columns()] for row in self.rows]
        note = "KL: KL(dense ‖ run) in nats a token. Peak: memory of the largest shard. Top-1: share of the positions "
        return table(header, cells) + f"\n\n{note}where the likeliest token is the dense model's."

    def _columns(self) -> list[str]:
        """The columns in which some row has something to show; what no run used would only make the table wide."""
        always = {"run", "perplexity", "sparsity", "status"}
        return [column for column in COLUMNS if column in always or any(row[column] is not None for row in self.rows)]


def compare(selection: Sequence[str], *, tracking_uri: str | None = None, out: Path | None = None) -> Comparison:
    """The runs of one experiment (by name; the newest if `selection` is empty) or those whose ids are given.

    A run's id is MLflow's, or the one in its run.json. With `out`, compare.md, compare.csv and perplexity.png are
    written there. Raises Refusal for an unknown name (naming the nearest), for an experiment without a finished run,
    and for a server that does not answer.
    """
    given = tracking_uri or default_tracking_uri()
    database, uri = sqlite_path(given), without_credentials(given)
    if database is not None and not database.exists():
        raise Refusal(
            f"no runs are recorded at {uri}: run `espalier prune` here, or set MLFLOW_TRACKING_URI to where they are"
        )
    try:
        client = open_client(given)
        title, runs = _select(client, list(selection), uri)
    except client_errors() as fault:
        raise Refusal(
            f"MLflow at {uri} cannot be read ({reason(fault)}): start the server, or set MLFLOW_TRACKING_URI to another"
        ) from fault
    rows = sorted((_row(run) for run in runs), key=_rank)
    if not any(row["status"] == "FINISHED" for row in rows):
        states = ", ".join(f"{row['run']} is {row['status'].lower()}" for row in rows[:5]) or "it holds no runs"
        raise Refusal(f"{title} at {uri} has no finished run to compare ({states}): wait for one, or name another")
    comparison = Comparison(title, rows)
    return comparison if out is None else Comparison(title, rows, _write(comparison, out))


def _select(client: "MlflowClient", selection: list[str], uri: str) -> tuple[str, list["Run"]]:
    experiments = list(client.search_experiments(max_results=PAGE))
    if not selection:
        experiment = _newest(client, experiments, uri)
        return f"experiment {experiment.name}", _all_runs(client, [experiment.experiment_id])
    named = {experiment.name: experiment for experiment in experiments}
    if len(selection) == 1 and selection[0] in named:
        experiment = named[selection[0]]
        return f"experiment {experiment.name}", _all_runs(client, [experiment.experiment_id])
    everywhere = [experiment.experiment_id for experiment in experiments]
    found = {name: _find_run(client, name, everywhere) for name in dict.fromkeys(selection)}
    for name, run in found.items():
        if run is None:
            raise Refusal(_unknown(client, name, experiments, uri))
    runs = {run.info.run_id: run for run in found.values() if run is not None}
    return "runs", list(runs.values())


def _newest(client: "MlflowClient", experiments: "list[Experiment]", uri: str) -> "Experiment":
    """The experiment in which Espalier last began a run; a server may hold other people's as well."""
    latest = client.search_runs(
        [experiment.experiment_id for experiment in experiments],
        "tags.`espalier.command` LIKE '%'",
        max_results=1,
        order_by=["attributes.start_time DESC"],
    )
    if not latest:
        raise Refusal(f"no runs of Espalier are recorded at {uri}: run `espalier prune`, or name an experiment")
    return next(some for some in experiments if some.experiment_id == latest[0].info.experiment_id)


def _all_runs(client: "MlflowClient", experiment_ids: list[str], filter_string: str = "") -> list["Run"]:
    runs: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs(experiment_ids, filter_string, max_results=PAGE, page_token=token)
        runs.extend(page)
        token = page.token
        if not token:
            return runs


def _find_run(client: "MlflowClient", name: str, experiment_ids: list[str]) -> "Run | None":
    """The run with this MLflow id, or else the newest that Espalier gave this id."""
    try:
        return client.get_run(name)
    except Exception as fault:
        if not is_final(fault):
            raise
    if "'" in name or "`" in name:
        return None
    found = client.search_runs(experiment_ids, f"tags.`espalier.run_id` = '{name}'", max_results=1)
    return found[0] if found else None


def _unknown(client: "MlflowClient", name: str, experiments: "list[Experiment]", uri: str) -> str:
    """What to say of a name that is neither an experiment nor a run: the nearest of both kinds."""
    names = [experiment.name for experiment in experiments]
    near = nearest(name, names, at_most=3)
    recent = client.search_runs([e.experiment_id for e in experiments], max_results=100)
    ids = [run.info.run_id for run in recent]
    ids += [run.data.tags["espalier.run_id"] for run in recent if "espalier.run_id" in run.data.tags]
    near += nearest(name, ids, at_most=2, cutoff=0.6)
    if near:
        remedy = f"did you mean {' or '.join(repr(some) for some in near)}?"
    else:
        remedy = f"the experiments are {', '.join(repr(some) for some in names[:8])}"
    return f"no experiment or run {name!r} at {uri}: {remedy}"


def _row(run: "Run") -> dict[str, Any]:
    params, metrics = run.data.params, run.data.metrics

    def param(name: str) -> str | None:
        value = params.get(name)
        return None if value in (None, "", "None", "none", "null") else value

    def metric(name: str) -> float | None:
        value = metrics.get(name)  # MLflow's database has no infinity and keeps the largest float in its place
        return math.inf if value is not None and value >= sys.float_info.max else value

    reconstructed = param("reconstruct")
    sparsity, threshold = param("sparsity"), param("threshold")
    return {
        "run": run.info.run_name or run.info.run_id,
        "criterion": param("criterion") or run.data.tags.get("espalier.command"),  # training has none
        "target": param("pattern") or (f"{threshold} σ" if threshold else _share(sparsity) if sparsity else None),
        "refine": param("refine"),
        "reconstruct": reconstructed,
        "inputs": param("inputs") if reconstructed else None,
        "epochs": param("epochs") if reconstructed else None,
        "compute": run.data.tags.get(COMPUTE_TAG),
        "perplexity": metric("perplexity"),
        "dense_perplexity": metric("dense_perplexity"),
        "kl": metric("kl"),
        "top1_agreement": metrics.get("top1_agreement"),
        "sparsity": metrics.get("sparsity"),
        "seconds": metrics.get("seconds/total"),
        "shard_peak_mb": metrics.get("peak_memory_mb/shard_max"),
        "status": run.info.status,
        "scope": param("scope"),
        "model": param("model"),
        "seed": param("seed"),
        "run_id": run.info.run_id,
        "pattern": param("pattern"),
    }


def _share(text: str) -> str:
    try:
        return target_share(float(text))
    except ValueError:
        return text


def _rank(row: dict[str, Any]) -> tuple[bool, float, str]:
    perplexity = row["perplexity"]
    missing = perplexity is None or math.isnan(perplexity)
    return missing, math.inf if missing else perplexity, row["run"]


def recipe(row: dict[str, Any]) -> str:
    """What was done, without how much of it: runs that share this make one line in the picture."""
    text = " ".join(filter(None, (row["criterion"] or "unknown criterion", row["pattern"])))
    if row["scope"] not in (None, "auto", "row"):
        text += f" per {row['scope']}"
    if row["refine"]:
        text += f" + {row['refine']}"
    if row["reconstruct"]:
        epochs = f", {row['epochs']} epochs" if row["epochs"] not in (None, "1", "1.0") else ""
        text += f" + {row['reconstruct']} reconstruction ({row['inputs'] or 'dense'} inputs{epochs})"
    return text


def _cell(row: dict[str, Any], column: str) -> str:
    value = row[column]
    return "–" if value is None else str(COLUMNS[column][1](value))


def _write(comparison: Comparison, out: Path) -> list[Path]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        written = [_write_csv(comparison.rows, out / "compare.csv")]
        picture = _draw(comparison.rows, out / "perplexity.png")
        text = f"# {comparison.title[0].upper()}{comparison.title[1:]}\n\n{comparison.markdown()}\n"
        if picture is not None:
            text += f"\n![Perplexity against sparsity, a line for each recipe]({picture.name})\n"
            written.append(picture)
        write_text(out / "compare.md", text)
    except OSError as fault:
        raise Refusal(f"cannot write the comparison to {out} ({fault.strerror}): name another folder") from fault
    return [*written, out / "compare.md"]


def _write_csv(rows: list[dict[str, Any]], path: Path) -> Path:
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FILE_COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def _draw(rows: list[dict[str, Any]], path: Path) -> Path | None:
    """Finished runs only; with more than one model, each has its own lines."""
    done = [row for row in rows if row["status"] == "FINISHED" and _positive(row["perplexity"])]
    several = len({row["model"] for row in done}) > 1
    curves: dict[str, list[tuple[float, float]]] = {}
    dense: dict[str, float] = {}
    for row in done:
        suffix = f", {Path(row['model']).name}" if several and row["model"] else ""
        if row["sparsity"] is not None:
            curves.setdefault(recipe(row) + suffix, []).append((row["sparsity"], row["perplexity"]))
        if _positive(row["dense_perplexity"]):
            dense[f"dense{suffix}"] = row["dense_perplexity"]
    return draw_perplexity(curves, dense, path)


def _positive(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0
