"""The record of a run: MLflow, written off the run's own thread, with a local copy of every number.

A tracking server that is down or slow costs one warning. It never costs the run, nor its speed: `Recorder.metrics`
appends one line to a local file and returns; a daemon thread imports MLflow, opens the run and sends what has gathered.
"""

import contextlib
import json
import math
import queue
import shlex
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.cluster.connection.redact import without_credentials, without_secrets
from espalier.pipeline.record.metrics_file import LocalCopy, Point
from espalier.pipeline.record.mlflow_client import (
    KEY_LENGTH,
    default_tracking_uri,
    existing_run,
    experiment_id,
    is_final,
    key_of,
    open_client,
    reason,
    ui_command,
)
from espalier.stages.storage.files import write_text

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

__all__ = ["Recorder", "default_tracking_uri", "recorded_run", "ui_command"]

LINK = "mlflow.json"  # which MLflow run a directory's numbers went to
GATHER_SECONDS = 0.5  # a batch is what came in during this time
LONGEST_PAUSE_SECONDS = 30.0  # between two attempts at a server that does not answer
UNREACHED_CLOSE_SECONDS = 5.0  # the most that a server which never once answered may delay the end of a run
METRICS_PER_BATCH, ENTRIES_PER_BATCH = 1000, 100  # MLflow's limits for one log_batch, as are the lengths below
PARAM_LENGTH, TAG_LENGTH = 6000, 8000


def recorded_run(directory: Path) -> str | None:
    """The MLflow run that a Recorder of this directory wrote down as soon as it had one, for a resume to continue."""
    return _link(directory).get("run_id")


def _link(directory: Path) -> dict[str, str]:
    try:
        link = json.loads((directory / LINK).read_text())
        return {name: str(value) for name, value in link.items()}
    except (OSError, ValueError, AttributeError):
        return {}


@dataclass(frozen=True)
class _End:
    status: str
    milliseconds: int


@dataclass(frozen=True)
class _Tag:
    key: str
    value: str


_Item = Point | Path | _Tag | _End


class Recorder:
    """One MLflow run, and its local copy `directory/metrics.jsonl`: a line with the time for each call of `metrics`.

    With `run_id` that MLflow run goes on (a resumed run); with `parent` it is shown within that one. Lines that the
    directory already holds are sent again, so what a killed driver had not sent is not lost; MLflow drops exact
    repeats. No method raises for the tracker's sake.
    """

    def __init__(
        self,
        *,
        experiment: str,
        run_name: str,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        directory: Path,
        tracking_uri: str | None = None,
        run_id: str | None = None,
        parent: str | None = None,
    ) -> None:
        self._uri = tracking_uri or default_tracking_uri()
        self.tracking_uri = without_credentials(self._uri)  # as it may be shown and stored
        self.run_id: str | None = None
        self._experiment, self._run_name, self._continues = experiment, run_name, run_id
        self._params = {key_of(name): without_secrets(str(value))[:PARAM_LENGTH] for name, value in params.items()}
        # Whether a run was made although the answer got lost can be told by this tag.
        self._token = uuid.uuid4().hex
        nested = {"mlflow.parentRunId": parent} if parent else {}
        self._tags = {key_of(name): str(value)[:TAG_LENGTH] for name, value in {**tags, **nested}.items()}
        self._directory = directory.absolute()
        self._copy = LocalCopy(self._directory)
        self._client: MlflowClient | None = None
        self._queue: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._pending: deque[_Item] = deque()  # the thread's own, in order; an item leaves it once it is sent
        self._closing, self._deadline = threading.Event(), math.inf
        self._attempted = threading.Event()  # the server has answered, or failed to, once
        self._fault: str | None = None  # why the last attempt failed
        self._lost: list[str] = []  # what the server refused for good
        self._reached = self._unfinished = False
        before = _link(self._directory).get("tracking_uri", self.tracking_uri)
        self._moved = before if run_id and before != self.tracking_uri else None  # a resumed run, recorded elsewhere
        for point in self._copy.points():
            self._queue.put(point)
        self._thread = threading.Thread(target=self._work, name="espalier-record", daemon=True)
        self._thread.start()

    @property
    def local_copy(self) -> Path:
        return self._copy.path

    @property
    def warning(self) -> str | None:
        """One line on what is not (or not yet) in MLflow, and where it is instead; None when all is well."""
        parts = []
        if self._fault or self._unfinished:
            quoted = shlex.quote(str(self.local_copy))
            parts.append(
                f"MLflow at {self.tracking_uri} did not take the whole record ({self._fault or 'not in time'}): every "
                f"number is in {self.local_copy}, to be read with: python -m json.tool --json-lines {quoted}"
            )
        if self._lost:
            more = f" and {len(self._lost) - 3} more" if len(self._lost) > 3 else ""
            parts.append(f"MLflow at {self.tracking_uri} refused {'; '.join(self._lost[:3])}{more}")
        if self._moved:
            parts.append(
                f"this run began in MLflow at {self._moved} and went on at {self.tracking_uri}, because "
                "MLFLOW_TRACKING_URI now says so"
            )
        if self._copy.fault:
            parts.append(f"no local copy of the metrics in {self.local_copy} ({self._copy.fault})")
        return "; ".join(parts) or None

    def wait_for_run_id(self, timeout_seconds: float) -> str | None:
        """The MLflow run id, waited for until the first attempt to reach the server is over; None if it failed."""
        self._attempted.wait(timeout_seconds)
        return self.run_id

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Record `values` at `step`. Takes microseconds, whatever the server does."""
        milliseconds = time.time_ns() // 1_000_000
        numbers = {key_of(name): float(value) for name, value in values.items()}
        self._copy.write(numbers, milliseconds, step)
        for name, value in numbers.items():
            self._queue.put(Point(name, value, milliseconds, step))

    def tag(self, name: str, value: str) -> None:
        """Tell of the run what was not known when it began, in its turn."""
        self._queue.put(_Tag(key_of(name), value[:TAG_LENGTH]))

    def artifact(self, path: Path) -> None:
        """Send a file or a folder along, in its turn. It must stay as it is until `close`."""
        self._queue.put(path.absolute())

    def close(self, status: str = "FINISHED", timeout_seconds: float = 30) -> None:
        """End the run (FINISHED, FAILED or KILLED) as of now, and wait at most `timeout_seconds` for it to be sent.

        A server that has not answered once since the run began is given UNREACHED_CLOSE_SECONDS at most.
        """
        if self._closing.is_set():
            return
        self._end(status, timeout_seconds)

    def cut_short(self) -> None:
        """End the run as KILLED, for a process that has a second left."""
        self._end("KILLED", timeout_seconds=1)

    def abandon(self, failure: BaseException) -> None:
        """End the run as what `failure` makes of it, KILLED by Ctrl-C, else FAILED, also where it came into `close`."""
        self._end("KILLED" if isinstance(failure, KeyboardInterrupt) else "FAILED", timeout_seconds=5)

    def _end(self, status: str, timeout_seconds: float) -> None:
        """As `close`; what is still on its way then is sent before."""
        self._queue.put(_End(status, time.time_ns() // 1_000_000))
        self._deadline = time.monotonic() + timeout_seconds
        self._closing.set()
        self._thread.join(timeout_seconds)
        self._unfinished = self._thread.is_alive()

    # Everything below runs on the daemon thread.

    def _work(self) -> None:
        pause, give_up = 0.0, math.inf
        while True:
            closing = self._closing.wait(pause)
            try:
                self._flush()
                self._fault, pause = None, GATHER_SECONDS
            except Exception as fault:  # whatever MLflow or its libraries raise is a warning and another attempt
                self._fault, pause = reason(fault), min(max(1.0, 2 * pause), LONGEST_PAUSE_SECONDS)
            self._attempted.set()
            if not closing:
                continue
            if not self._reached and give_up == math.inf:
                give_up = time.monotonic() + UNREACHED_CLOSE_SECONDS
            left = min(self._deadline, give_up) - time.monotonic()
            if self._fault is None or left <= 0:
                return
            time.sleep(min(GATHER_SECONDS, left))

    def _flush(self) -> None:
        """Send all that has gathered, oldest first. Raises where the server does not answer; the rest stays pending."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._pending.append(self._queue.get_nowait())
        if self._client is None:
            self._open()
        while self._pending:
            points = list(takewhile(lambda item: isinstance(item, Point), islice(self._pending, METRICS_PER_BATCH)))
            taken = points or [self._pending[0]]
            try:
                self._send(taken)
            except Exception as fault:
                if not is_final(fault):
                    raise
                self._lost.append(f"{_describe(taken[0])} ({reason(fault)})")
            for _ in taken:
                self._pending.popleft()

    def _send(self, items: list[_Item]) -> None:
        from mlflow.entities import Metric

        assert self._client is not None and self.run_id is not None
        first = items[0]
        if isinstance(first, Path):
            if first.is_dir():
                self._client.log_artifacts(self.run_id, str(first))
            else:
                self._client.log_artifact(self.run_id, str(first))
        elif isinstance(first, _Tag):
            self._client.set_tag(self.run_id, first.key, first.value)
        elif isinstance(first, _End):
            self._client.set_terminated(self.run_id, status=first.status, end_time=first.milliseconds)
        else:
            points = [item for item in items if isinstance(item, Point)]
            sent = [Metric(p.key, p.value, p.milliseconds, p.step) for p in points]
            self._client.log_batch(self.run_id, metrics=sent)

    def _open(self) -> None:
        """Find or make the MLflow run, give it its parameters, and note its id beside the local copy."""
        from mlflow.entities import Param, RunTag

        client = open_client(self._uri)
        run = existing_run(client, self._continues) if self._continues else None
        if run is not None:
            client.update_run(run.info.run_id, status="RUNNING")
        else:
            run = self._make_run(client)
        self._reached = True
        known = run.data.params
        params = [Param(name, value) for name, value in self._params.items() if name not in known]
        tags = [RunTag(name, value) for name, value in self._tags.items()]
        # MLflow's parameters cannot change: what a resumed run does differently (its shards, say) becomes a tag.
        tags += [
            RunTag(f"espalier.resumed.{name}"[:KEY_LENGTH], value)
            for name, value in self._params.items()
            if known.get(name, value) != value
        ]
        for some in _chunks(params):
            client.log_batch(run.info.run_id, params=some)
        for some in _chunks(tags):
            client.log_batch(run.info.run_id, tags=some)
        self.run_id, self._client = run.info.run_id, client
        self._attempted.set()
        self._note_link()

    def _make_run(self, client: "MlflowClient") -> "Run":
        experiment = experiment_id(client, self._experiment, self._uri)
        if self._fault is not None:  # the answer to an earlier attempt may have been lost, and not the run
            found = client.search_runs([experiment], f"tags.`espalier.recorder` = '{self._token}'", max_results=1)
            if found:
                return found[0]
        return client.create_run(experiment, tags={"espalier.recorder": self._token}, run_name=self._run_name)

    def _note_link(self) -> None:
        if time.monotonic() > self._deadline:  # `close` has stopped waiting: the directory is no longer ours
            return
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            link = {"run_id": self.run_id, "tracking_uri": self.tracking_uri}
            write_text(self._directory / LINK, json.dumps(link) + "\n")
        except OSError as fault:
            self._copy.fault = reason(fault)


def _describe(item: _Item) -> str:
    if isinstance(item, Path):
        return f"artifact {item.name}"
    if isinstance(item, _Tag):
        return f"tag {item.key}"
    return "metrics" if isinstance(item, Point) else "end of the run"


def _chunks(entries: list[Any]) -> Iterable[list[Any]]:
    return (entries[start : start + ENTRIES_PER_BATCH] for start in range(0, len(entries), ENTRIES_PER_BATCH))
