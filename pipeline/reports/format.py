"""Numbers, sizes, times and tables as a person reads them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


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


def percent(share: float | None) -> str:
    """A measured share, always to two places: 50.00 %."""
    return "–" if share is None else f"{100 * share:.2f} %"


def target_share(share: float) -> str:
    """A share that was asked for, as it was asked for: 50 %, 62.5 %."""
    return f"{100 * share:g} %"


def perplexity(value: float | None) -> str:
    """To two places: 21.70; one that means nothing any more, to four digits."""
    if value is None:
        return "–"
    return f"{value:,.2f}" if value < 1e6 else number(value)


def nats(value: float | None) -> str:
    """A KL divergence or a difference of losses, in nats a token: 0.0578."""
    return "–" if value is None else f"{value:.4f}" if abs(value) < 100 else number(value)


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
    """Seconds as 0.05 s, 4.8 s, 2.1 min, or 1 h 03 min."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"
