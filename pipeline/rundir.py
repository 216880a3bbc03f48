"""A run's own directory inside the output: what was asked, what is finished, and who may go on from it.

OUTPUT/model-block-00003.safetensors   a finished block (written under a temporary name, then renamed)
OUTPUT/espalier/run.json               request, plan, and at the end everything that was measured
OUTPUT/espalier/journal.jsonl          one line for each finished thing, appended and synced
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.checkpoint import file_digest, sync_directory
from stages.errors import Refusal

HOME = "espalier"


class RunDirectory:
    """The files of one run. Make one with `claim` (a new run) or `reopen` (one to go on with)."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.home = output / HOME
        self.run_file = self.home / "run.json"
        self._journal = self.home / "journal.jsonl"

    @classmethod
    def claim(cls, output: Path, run: dict[str, Any]) -> "RunDirectory":
        """A new run's directory. Raises Refusal unless `output` is new or empty and can be written to."""
        directory = cls(output)
        check_free(output)
        try:
            directory.home.mkdir(parents=True)
        except OSError as error:
            raise Refusal(f"output {output}: cannot be made ({error.strerror}); give another --output") from None
        directory.write(run)
        return directory

    @classmethod
    def reopen(cls, output: Path) -> tuple["RunDirectory", dict[str, Any]]:
        """An unfinished run's directory and its run.json. Raises Refusal if there is none, or it is finished."""
        directory = cls(output)
        if not directory.run_file.is_file():
            raise Refusal(f"{output}: no run to resume in it (no {HOME}/run.json); start one with `espalier prune`")
        run = json.loads(directory.run_file.read_text())
        if run["status"] == "finished":
            raise Refusal(f"{output}: this run is finished; see {directory.home / 'report.md'}")
        for leftover in [*output.glob(".*.tmp"), *directory.home.glob(".*.tmp")]:
            leftover.unlink()
        return directory, run

    def write(self, run: dict[str, Any]) -> None:
        """Replace run.json in one step."""
        temporary = self.home / ".run.json.tmp"
        write_synced(temporary, json.dumps(run, indent=1))
        os.replace(temporary, self.run_file)
        sync_directory(self.home)

    def note(self, event: str, **fields: Any) -> None:
        """Append one line to the journal and sync it."""
        with self._journal.open("ab") as journal:
            journal.write(json.dumps({"event": event, **fields}).encode() + b"\n")
            journal.flush()
            os.fsync(journal.fileno())

    def noted(self, event: str) -> Iterator[dict[str, Any]]:
        """The journal's lines of one kind, oldest first; a line torn by a kill is not one."""
        if not self._journal.exists():
            return
        for line in self._journal.read_bytes().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry["event"] == event:
                yield entry

    def finished_blocks(self) -> dict[int, dict[str, Any]]:
        """Block -> its report, for the blocks whose files still are what the journal says."""
        reports = {entry["block"]: entry for entry in self.noted("block")}
        return {
            block: {key: value for key, value in report.items() if key != "event"}
            for block, report in sorted(reports.items())
            if (path := self.output / report["file"]).is_file() and file_digest(path) == report["digest"]
        }


def check_free(output: Path) -> None:
    """Raises Refusal unless `output` is missing or an empty directory, saying whose it is."""
    if output.exists() and not output.is_dir():
        raise Refusal(f"output {output}: a file; give a directory that is new or empty")
    if not output.is_dir() or not any(output.iterdir()):
        return
    run_file = output / HOME / "run.json"
    if not run_file.is_file():
        raise Refusal(f"output {output}: not empty; give a directory that is new or empty")
    status = json.loads(run_file.read_text()).get("status")
    if status == "finished":
        raise Refusal(f"output {output}: holds a finished run; give another directory, or remove this one")
    raise Refusal(f"output {output}: belongs to a run that is not finished; `espalier resume {output}` goes on with it")


def write_synced(path: Path, text: str) -> None:
    """Write a small file so that it is on disk when this returns."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
