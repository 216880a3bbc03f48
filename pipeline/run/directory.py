"""A run's own directory inside the output: what was asked, what is finished, and who may go on from it.

OUTPUT/model-block-00003.safetensors   a finished block (written under a temporary name, then renamed)
OUTPUT/espalier/run.json               request, plan, and at the end everything that was measured
OUTPUT/espalier/journal.jsonl          one line for each finished thing, appended and synced
OUTPUT/espalier/sweep-0/               blocks as a sweep left them, until the next one is done with all of its own
"""

import contextlib
import errno
import fcntl
import json
import os
import shlex
import shutil
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, cast

from espalier.cluster.connection.redact import storable
from espalier.pipeline.record.run_record import Command, ModelRecord, RunRecord, Status
from espalier.pipeline.run.stopping import at_the_last
from espalier.stages.block_report import BlockReport
from espalier.stages.errors import Refusal
from espalier.stages.shard.spec import HOME, sweep_directory
from espalier.stages.storage.files import file_digest, is_full, write_text

LOCK = "lock"  # in a run's own directory; held, and named in it, is the process at work
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # what a file system without them answers


class RunDirectory:
    """The files of one run. Make one with `begin` (a new run) or `reopen` (one to go on with), and `release` it."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.home = output / HOME
        self.run_file = self.home / "run.json"
        self._journal = self.home / "journal.jsonl"
        self._made: list[Path] = []  # directories that were not there before
        self._lock: IO[str] | None = None
        self._finished = False

    @classmethod
    def begin(
        cls,
        output: Path,
        command: Command,
        config: dict[str, Any],
        fingerprint: str | None,
        model: ModelRecord | None = None,
    ) -> tuple["RunDirectory", RunRecord]:
        """A new run's directory and the run.json that it begins with: what was asked, and of which model.

        Raises Refusal as `claim` does.
        """
        facts = {} if model is None else {"model": model}
        run = {
            "run_id": uuid.uuid4().hex[:12],
            "command": command,
            "status": "running",
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": config,
            **facts,
            "fingerprint": fingerprint,
            "output": str(output),
        }
        begun = cast(RunRecord, run)
        return cls.claim(output, begun), begun

    @classmethod
    def claim(cls, output: Path, run: RunRecord) -> "RunDirectory":
        """A new run's directory. Raises Refusal unless `output` is new or empty and can be written to."""
        directory = cls(output)
        check_free(output)
        directory._made = [path for path in (directory.home, output, *output.parents) if not path.exists()]
        try:
            directory.home.mkdir(parents=True)
            directory._hold()
            directory.write(run)
        except OSError as error:
            directory.discard()
            raise Refusal(f"output {output}: cannot be made ({error.strerror}); give another --output") from None
        return directory

    @classmethod
    def reopen(cls, output: Path) -> tuple["RunDirectory", RunRecord]:
        """An unfinished run's directory and its run.json.

        Raises Refusal if there is none, if it is finished, or if another process is at work on it.
        """
        directory = cls(output)
        run = recorded(output)
        if run is None:
            raise Refusal(f"{output}: no run to resume in it (no {HOME}/run.json); start one with `espalier prune`")
        if run["status"] == "finished":
            reports = [directory.home / name for name in ("report.md", "run.json")]
            raise Refusal(f"{output}: this run is finished; see {next(path for path in reports if path.exists())}")
        directory._hold()
        run["status"] = "running"
        directory.write(run)
        for leftover in [*output.glob(".*.tmp"), *output.glob(".tmp*"), *directory.home.glob(".*.tmp")]:
            leftover.unlink()
        directory._end_torn_line()
        return directory, run

    @contextlib.contextmanager
    def at_work(self, worked: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Within it the run is made, or gone on with; then it is let go.

        A Refusal of a run that has not `worked`, so that nothing in it is of use to a resumed one, takes the directory
        back: the same command may be given again. One that is interrupted is noted as such, and with it how to go on.
        """
        with at_the_last(self._interrupted):
            try:
                yield
            except KeyboardInterrupt as stop:
                stop.add_note(self._interrupted())
                raise
            except Exception as failure:
                if isinstance(failure, Refusal) and not worked():
                    self.discard()
                else:
                    self._ended_as("failed")
                raise
            finally:
                self.release()

    def _interrupted(self) -> str:
        """How to go on with a run that is noted as interrupted; that it is finished, where only the end was."""
        if self._finished:
            return f"the run in {self.output} is finished"
        self._ended_as("interrupted")
        return f"`espalier resume {shlex.quote(str(self.output))}` goes on"

    def _ended_as(self, status: Status) -> None:
        if (run := recorded(self.output)) is not None and not self._finished:
            with contextlib.suppress(OSError):  # of a full disk, say: what ended the run is to be told
                self.write(run | {"status": status})

    def release(self) -> None:
        """Let another process go on from here."""
        if self._lock is not None:
            self._lock.close()

    def discard(self) -> None:
        """Take back a claim: what `claim` made goes, and nothing else."""
        self.release()
        shutil.rmtree(self.home, ignore_errors=True)
        for path in self._made:
            with contextlib.suppress(OSError):  # not empty any more: somebody else's now
                path.rmdir()

    def _hold(self) -> None:
        self._lock = (self.home / LOCK).open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy = _at_work(self.output) or "another process is at work on this run"
            raise Refusal(f"{self.output}: {busy}; let it end, or end it") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()

    def _end_torn_line(self) -> None:
        """A kill may have torn the last line: end it, so that the next one stands by itself."""
        if self._journal.exists() and not self._journal.read_bytes().endswith(b"\n"):
            with self._journal.open("ab") as journal:
                journal.write(b"\n")

    def write(self, run: RunRecord) -> None:
        """Replace run.json in one step."""
        write_text(self.run_file, json.dumps(storable(run), indent=1))

    def finish(self, run: RunRecord) -> None:
        """Replace run.json for the last time: whatever ends the process from here on, the run is finished.

        Until then it is not, although its run.json, on its way to MLflow, may say so.
        """
        self.write(run | {"status": "finished"})
        self._finished = True

    def note(self, event: str, **fields: Any) -> None:
        """Append one line to the journal and sync it."""
        with self._journal.open("ab") as journal:
            journal.write(json.dumps(storable({"event": event, **fields})).encode() + b"\n")
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
            if entry.pop("event") == event:
                yield entry

    def finished_blocks(self, sweep: int = 0, sweeps: int = 0) -> dict[int, BlockReport]:
        """Block -> its report in one of so many sweeps, for the blocks whose files still are what the journal says."""
        reports = {entry["block"]: cast(BlockReport, entry) for entry in self.noted("block") if entry["sweep"] == sweep}
        directory = sweep_directory(self.output, sweep, sweeps)
        return {
            block: report
            for block, report in sorted(reports.items())
            if _is_whole(directory / report["file"], report["digest"])
        }

    def drop_sweep(self, sweep: int, sweeps: int) -> None:
        """Remove what a sweep left, if it is not the result."""
        if sweep < sweeps:
            shutil.rmtree(sweep_directory(self.output, sweep, sweeps), ignore_errors=True)

    def note_ends(self, files: Iterable[str]) -> None:
        """Note the files that hold what lies outside the blocks, with their digests."""
        self.note("ends", files={file: file_digest(self.output / file) for file in files})

    def finished_ends(self) -> list[str] | None:
        """The files last noted by `note_ends`; None if there are none, or one is not what it was."""
        noted: dict[str, str] = next((entry["files"] for entry in reversed(list(self.noted("ends")))), {})
        return list(noted) if noted and all(_is_whole(self.output / f, digest) for f, digest in noted.items()) else None


def _at_work(output: Path) -> str | None:
    """Which process is at work on the run in `output`; None if none is, or the file system has no locks."""
    try:
        with (output / HOME / LOCK).open() as lock:
            who = lock.read() or "another process"
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return f"{who} is at work on this run"
    except OSError as error:
        if error.errno not in (*NO_LOCKS, errno.ENOENT):
            raise
    return None


def check_free(output: Path) -> None:
    """Raises Refusal unless `output` is missing or an empty directory, saying whose it is."""
    if output.exists() and not output.is_dir():
        raise Refusal(f"output {output}: a file; give a directory that is new or empty")
    if not output.is_dir() or not any(output.iterdir()):
        return
    run = recorded(output)
    if run is None:
        raise Refusal(f"output {output}: not empty; give a directory that is new or empty")
    if run["status"] == "finished":
        raise Refusal(f"output {output}: holds a finished run; give another directory, or remove this one")
    if busy := _at_work(output):
        raise Refusal(f"output {output}: {busy}; let it end, or give another directory")
    raise Refusal(f"output {output}: belongs to a run that is not finished; `espalier resume {output}` goes on with it")


def command_of(output: Path) -> Command | None:
    """The command whose run is in `output`; None if there is none."""
    run = recorded(output)
    return None if run is None else run.get("command")


def check_same_model(run: RunRecord, fingerprint: str) -> None:
    """Raises Refusal unless the model that a resumed run finds is the one that it began with."""
    if fingerprint != run["fingerprint"]:
        raise Refusal(
            f"{run['config']['model']}: not the checkpoint that this run began with; put that one back, or start anew"
        )


def _is_whole(path: Path, digest: str) -> bool:
    return path.is_file() and file_digest(path) == digest


def recorded(output: Path) -> RunRecord | None:
    """The run.json in `output`; None where there is none, or one that Espalier did not write."""
    try:
        run = json.loads((output / HOME / "run.json").read_text())
    except (OSError, ValueError):
        return None
    ours = isinstance(run, dict) and {"status", "config", "fingerprint"} <= run.keys()
    return cast(RunRecord, run) if ours else None


@contextlib.contextmanager
def disk_full_refused(output: Path) -> Iterator[None]:
    """Turns a full disk, met anywhere within, into a Refusal that says how to go on."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise Refusal(f"output {output}: disk full; free some space, then `espalier resume {output}`") from error
