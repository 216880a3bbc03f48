"""The pictures of a run and of a comparison, as PNG files. Colours are Okabe and Ito's, told apart by the colour-blind.

Figures are made without pyplot: no global state, no display, safe in any thread.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from espalier.pipeline.record.run_record import Span, TrackPoint
from espalier.stages.block_report import BlockReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#7F7F7F"
RECIPE_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
PHASE_COLOURS = {"stream": SKY, "mask": GREEN, "reconstruct": BLUE, "commit": VERMILLION, "evaluate": ORANGE}
COMPONENT_NAMES = {"self_attn": "Attention", "attn": "Attention", "attention": "Attention", "mlp": "MLP"}
Which = Literal["error_before", "error_after"]
DOTS_PER_INCH = 150
PANELS_PER_ROW = 2


def component_title(name: str) -> str:
    """`Attention (self_attn)`: what a reader calls it, then what the model does."""
    plain = COMPONENT_NAMES.get(name)
    return f"{plain} ({name})" if plain and plain.lower() != name else plain or name


def unit_names(blocks: Iterable[BlockReport]) -> list[str]:
    """The names of the reconstructed units, in the order in which they first appear."""
    return list(dict.fromkeys(unit["name"] for block in blocks for unit in block.get("units", ())))


def draw_errors(blocks: Sequence[BlockReport], path: Path) -> Path | None:
    """Relative squared error of each unit, by block, before and after reconstruction; None if none was measured."""
    names = [name for name in unit_names(blocks) if any(_errors(blocks, name, which)[0] for which in _BEFORE_AFTER)]
    if not names:
        return None
    columns = min(len(names), PANELS_PER_ROW)
    rows = math.ceil(len(names) / columns)
    figure = _figure(width=5.2 * columns + 0.6, height=3.3 * rows + 0.7)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    panels = list(grid.flat)
    values = [value for name in names for which in _BEFORE_AFTER for value in _errors(blocks, name, which)[1]]
    for axes, name in zip(panels, names, strict=False):
        _draw_error_panel(axes, blocks, name)
    for unused in panels[len(names) :]:
        unused.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("block")
    if 0 < 3 * min(values) < max(values):
        _log_scale(panels[0], min(values), max(values))  # the panels share it
    entries = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=3, frameon=False)
    figure.supylabel("relative squared error\n" + r"$\|\tilde{f}(x) - f(x)\|^2\ /\ \|f(x)\|^2$", fontsize=10)
    figure.suptitle("Distance from the dense model, on held-out calibration windows", fontsize=12)
    return _save(figure, path)


_BEFORE_AFTER: tuple[Which, ...] = ("error_before", "error_after")


def _draw_error_panel(axes: "Axes", blocks: Sequence[BlockReport], name: str) -> None:
    from matplotlib.ticker import MaxNLocator

    size = 6 if len(blocks) <= 24 else 3
    axes.set_title(component_title(name), fontsize=11)
    axes.plot(
        *_errors(blocks, name, "error_before"), "--o", color=GREY, markerfacecolor="white", markersize=size,
        label="pruned, not reconstructed",
    )  # fmt: skip
    axes.plot(
        *_errors(blocks, name, "error_after"), "-o", color=BLUE, markersize=size, label="pruned and reconstructed"
    )
    kept = [block for block in blocks for unit in block["units"] if unit["name"] == name and not unit["improved"]]
    if kept:
        axes.plot(
            *_errors(kept, name, "error_after"), "x", color=VERMILLION, markersize=10, markeredgewidth=2,
            label="reconstruction did not help: kept as pruned",
        )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True, which="major", alpha=0.3)


def _errors(blocks: Iterable[BlockReport], name: str, which: Which) -> tuple[list[int], list[float]]:
    found = [
        (int(block["block"]), float(unit[which]))
        for block in blocks
        for unit in block.get("units", ())
        if unit["name"] == name and unit.get(which) is not None and math.isfinite(unit[which])
    ]
    return [index for index, _ in found], [value for _, value in found]


def draw_timeline(spans: Sequence[Span], path: Path) -> Path | None:
    """What each shard was doing when, a row for a shard; None if there are no spans. Numbers in the bars are blocks."""
    if not spans:
        return None
    shards = sorted({int(span["shard"]) for span in spans})
    end = max(float(span["end"]) for span in spans)
    unit_seconds, unit = (1.0, "s") if end <= 300 else (60.0, "min") if end <= 3 * 3600 else (3600.0, "h")
    figure = _figure(width=10.5, height=min(1.9 + 0.55 * len(shards), 14))
    axes = figure.subplots()
    for row, shard in enumerate(shards):
        for span, lane, lanes in in_lanes([span for span in spans if int(span["shard"]) == shard]):
            start, length = span["start"] / unit_seconds, (span["end"] - span["start"]) / unit_seconds
            height = 0.8 / lanes
            bottom = row - 0.4 + lane * height
            colour = PHASE_COLOURS.get(span["phase"], GREY)
            edge = "white" if length > end / unit_seconds / 250 else "none"  # an edge would hide a thin bar
            axes.broken_barh([(start, length)], (bottom, height), facecolor=colour, edgecolor=edge, linewidth=0.6)
            if span.get("block") is not None and length > 0.022 * end / unit_seconds:
                dark = span["phase"] in ("reconstruct", "commit")
                axes.text(
                    start + length / 2, bottom + height / 2, str(span["block"]), ha="center", va="center",
                    fontsize=8, color="white" if dark else "black", clip_on=True,
                )  # fmt: skip
    axes.set_yticks(range(len(shards)), [f"shard {shard}" for shard in shards])
    axes.set_ylim(len(shards) - 0.5, -0.5)
    axes.set_xlim(0, 1.01 * end / unit_seconds)
    axes.set_xlabel(f"time since the run began ({unit})")
    axes.set_title("What each shard did (numbers are blocks)", fontsize=12)
    axes.grid(True, axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    _phase_legend(figure, {span["phase"] for span in spans})
    return _save(figure, path)


def in_lanes(spans: list[Span]) -> list[tuple[Span, int, int]]:
    """Each span with its lane and the number of lanes: spans that overlap in time lie in different lanes."""
    free_from: list[float] = []
    placed = []
    for span in sorted(spans, key=lambda span: (span["start"], span["end"])):
        lane = next((n for n, since in enumerate(free_from) if since <= span["start"] + 1e-3), len(free_from))
        free_from[lane : lane + 1] = [span["end"]]
        placed.append((span, lane))
    return [(span, lane, len(free_from)) for span, lane in placed]


def _phase_legend(figure: "Figure", phases: set[str]) -> None:
    from matplotlib.patches import Patch

    known = [phase for phase in PHASE_COLOURS if phase in phases] + sorted(phases - PHASE_COLOURS.keys())
    handles = [Patch(facecolor=PHASE_COLOURS.get(phase, GREY), label=phase) for phase in known]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def draw_perplexity(
    curves: Mapping[str, Sequence[tuple[float, float]]], dense: Mapping[str, float], path: Path
) -> Path | None:
    """Perplexity against sparsity (0 to 1), a curve through the means for each recipe; None if there is no point.

    `dense` names the horizontal lines. A logarithmic axis where the range asks for it.
    """
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return None
    figure = _figure(width=8.4, height=min(4.6 + 0.16 * (len(curves) + len(dense)), 12))
    axes = figure.subplots()
    for number, (label, curve) in enumerate(curves.items()):
        colour, marker = RECIPE_COLOURS[number % len(RECIPE_COLOURS)], MARKERS[number % len(MARKERS)]
        means = _means(curve)
        axes.plot([100 * x for x, _ in means], [y for _, y in means], "-", color=colour, linewidth=1.4)
        axes.plot(
            [100 * x for x, _ in curve], [y for _, y in curve], marker, color=colour, markersize=7,
            markeredgecolor="white", linestyle="none", label=label,
        )  # fmt: skip
    for number, (label, value) in enumerate(dense.items()):
        axes.axhline(value, linestyle=("--", ":", "-.")[number % 3], color="black", linewidth=1.2, label=label)
    values = [y for _, y in points] + list(dense.values())
    if max(values) > 5 * min(values):
        _log_scale(axes, min(values), max(values))
    axes.set_xlabel("zeros among the prunable weights (%)")
    axes.set_ylabel("perplexity (lower is better)")
    axes.set_title("Perplexity against sparsity", fontsize=12)
    axes.grid(True, which="major", alpha=0.3)
    axes.margins(x=0.08)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return _save(figure, path)


def draw_losses(losses: Sequence[float], evaluations: Sequence[tuple[int, float]], path: Path) -> Path:
    """The loss of every step, and after some of them that on the evaluation text, as (step, loss)."""
    figure = _figure(width=8.4, height=4.4)
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, "-", color=SKY, linewidth=1.0, label="training, each step")
    if evaluations:
        steps, held_out = zip(*evaluations, strict=True)
        axes.plot(steps, held_out, "-o", color=VERMILLION, markersize=5, label="evaluation text")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(True, which="major", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return _save(figure, path)


def draw_track(
    points: Sequence[TrackPoint],
    trained: float,
    published: Mapping[str, Sequence[tuple[float, float]]],
    path: Path,
    metric: str = "loss",
) -> Path:
    """The metric against sparsity, before and after fine-tuning, with what others published beside it.

    `points` have sparsity (0 to 1), pruned and tuned. The axis ends where the model without fine-tuning is far out of
    reach of all other curves.
    """
    figure = _figure(width=8.4, height=5.2)
    axes = figure.subplots()
    shares = [100 * point["sparsity"] for point in points]
    axes.plot(
        shares, [point["pruned"] for point in points], "--o", color=GREY, markerfacecolor="white", markersize=6,
        label="pruned, not fine-tuned",
    )  # fmt: skip
    axes.plot(shares, [point["tuned"] for point in points], "-o", color=BLUE, markersize=7, label="pruned, fine-tuned")
    axes.axhline(trained, linestyle=":", color="black", linewidth=1.2, label="trained, not pruned")
    for number, (name, curve) in enumerate(published.items()):
        colour, marker = RECIPE_COLOURS[1 + number % (len(RECIPE_COLOURS) - 1)], MARKERS[1 + number % 7]
        axes.plot([100 * x for x, _ in curve], [y for _, y in curve], "-", marker=marker, color=colour, label=name)
    others = [trained, *(point["tuned"] for point in points), *(y for curve in published.values() for _, y in curve)]
    low, high = min(others), max(others)
    if max(point["pruned"] for point in points) > high + 2 * (high - low) > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.6 * (high - low))
    axes.set_xlabel("zeros among the prunable weights (%)")
    axes.set_ylabel(f"{metric} (lower is better)")
    axes.set_title(f"{metric.capitalize()} against sparsity", fontsize=12)
    axes.grid(True, which="major", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return _save(figure, path)


def _means(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean of the points that share a sparsity (to 0.1 %), by sparsity: seeds of one recipe make one point."""
    groups: dict[float, list[tuple[float, float]]] = {}
    for x, y in curve:
        groups.setdefault(round(x, 3), []).append((x, y))
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for _, group in sorted(groups.items())
    ]


def _log_scale(axes: "Axes", low: float, high: float) -> None:
    """A logarithmic y axis whose ticks read 0.02, 0.05, 0.1 and not 2 × 10⁻²."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 200 * low else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:,.4g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: "Figure", path: Path) -> Path:
    figure.savefig(path, dpi=DOTS_PER_INCH, facecolor="white")
    return path
