"""The copy of a run's metrics in its own directory: one line of JSON for each call, with the time."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from espalier.pipeline.record.mlflow_client import reason

LOCAL_COPY = "metrics.jsonl"


@dataclass(frozen=True)
class Point:
    """One value of one metric."""

    key: str
    value: float
    milliseconds: int
    step: int


class LocalCopy:
    """`directory/metrics.jsonl`. A disk that does not take it is noted in `fault`, and raises nothing."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOCAL_COPY
        self.fault: str | None = None

    def write(self, numbers: Mapping[str, float], milliseconds: int, step: int) -> None:
        """Append one line."""
        record = {"time": milliseconds / 1000, "step": step, "metrics": _json_numbers(numbers)}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                if file.tell() > 0:  # a driver killed while writing leaves half a line: do not continue it
                    file.seek(-1, os.SEEK_END)
                    torn = file.read(1) != b"\n"
                else:
                    torn = False
                file.write((b"\n" if torn else b"") + json.dumps(record).encode() + b"\n")
        except OSError as fault:
            self.fault = reason(fault)

    def points(self) -> Iterator[Point]:
        """What it holds, with its own times; a line that was cut off is passed over."""
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return
        for line in lines:
            try:
                record = json.loads(line)
                points = [
                    Point(name, float(value), round(record["time"] * 1000), int(record["step"]))
                    for name, value in record["metrics"].items()
                ]
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            yield from points


def _json_numbers(values: Mapping[str, float]) -> dict[str, float | str]:
    """JSON has no infinity and no NaN: they become the strings that `float` reads back."""
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
