"""A command run as a Ray job: this project shipped along, its output followed to the end, its exit code handed back.

Over Ray's own client, which leaves three things to its caller: it starts with authentication off, it prefers
RAY_ADDRESS to the address it is given, and it waits without a limit for a server that does not answer.
"""

import asyncio
import contextlib
import logging
import os
import shlex
import sys
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.job_submission import JobStatus, JobSubmissionClient

from espalier.cluster.connection import authentication
from espalier.cluster.connection import code_package as package
from espalier.cluster.connection.connect import NOTHING, endpoint_of, probe, reachable
from espalier.cluster.connection.redact import without_credentials
from espalier.stages.errors import Refusal

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
PREFLIGHT_SECONDS = 5.0
READY_SECONDS = 20  # for the agent that makes jobs, which comes up seconds after its node
POLL_SECONDS = 0.3
LOST_AFTER = 5  # attempts in a row that fail before the server counts as gone
STOP_SECONDS = 30  # between the job's SIGINT and its SIGKILL: a run closes its journal and says how to resume
INTERRUPTED = 130  # what a shell reports for a command ended by Ctrl-C
LOST = (ConnectionError, OSError, RuntimeError, requests.RequestException, aiohttp.ClientError)
CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
T = TypeVar("T")


@dataclass(frozen=True)
class JobOutcome:
    """What became of a job. `exit_code` is its entrypoint's, 130 if it was stopped, None while nobody waited for it."""

    job_id: str
    status: str
    exit_code: int | None


def submit(
    entrypoint: list[str],
    *,
    address: str | None,
    env: dict[str, str],
    on_line: Callable[[str], None],
    follow: bool = True,
    own: Mapping[str, Path] = NOTHING,
) -> JobOutcome:
    """Runs `entrypoint` on the cluster and gives its outcome, with each line of its output passed to `on_line`.

    `address` is the dashboard's ("http://host:8265"), the cluster's ("host:6379", "auto"), or None for
    RAY_API_SERVER_ADDRESS, RAY_ADDRESS or port 8265 here. The job runs in a copy of this project's three packages and
    of the files in `own` (names there -> files here), so paths in it must be absolute; `env` is set for it and its
    workers. The token is not sent along: the nodes have it. An entrypoint that begins with "python" runs in a Python
    that has Ray. Ctrl-C stops the job.
    Raises Refusal within ten seconds where no dashboard answers or the token is not accepted.
    """
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)
    url, credentials = dashboard(address)
    settings = {**credentials.environment, "RAY_ADDRESS": None, "RAY_API_SERVER_ADDRESS": None}
    with authentication.ray_environment(settings):
        client = JobSubmissionClient(url)
        with package.staged(demo_model=True, own=own) as code:
            environment = {"working_dir": str(code), "env_vars": {**_stopping(), **env}}
            job_id = _accepted(client, url, _command(entrypoint), environment)
        on_line(f"job {job_id} submitted to {without_credentials(url)}")
        if not follow:
            return JobOutcome(job_id, str(client.get_job_status(job_id)), None)
        return _follow(client, job_id, url, on_line)


def _accepted(client: JobSubmissionClient, url: str, command: str, environment: dict[str, Any]) -> str:
    """The id of the job made of `command`. A cluster that has just started is given time for its first node."""
    give_up = time.monotonic() + READY_SECONDS
    while True:
        try:
            return client.submit_job(entrypoint=command, runtime_env=environment)
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            if time.monotonic() > give_up:
                raise Refusal(
                    f"the Ray cluster at {without_credentials(url)} has no node that takes jobs, for {READY_SECONDS} s "
                    "now; are its nodes alive (`ray status`), and did they start with the dashboard's agent?"
                ) from error
        time.sleep(1)


def dashboard(address: str | None) -> tuple[str, authentication.Credentials]:
    """The dashboard's URL behind `address`, seen to answer, and the credentials it took. Raises Refusal otherwise."""
    given = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or DEFAULT_ADDRESS
    credentials = authentication.find_credentials()
    is_url = given.startswith(("http://", "https://"))
    url = given.rstrip("/") if is_url else _url_from_cluster(given, credentials)
    _preflight(url, credentials)
    return url, credentials


def _url_from_cluster(address: str, credentials: authentication.Credentials) -> str:
    """The URL that the head at `address` has published for its dashboard."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    endpoint = endpoint_of(address)
    with authentication.ray_environment(credentials.environment):
        probe(endpoint, credentials)
        published = GcsClient(address=endpoint).internal_kv_get(b"dashboard", b"dashboard", timeout=PREFLIGHT_SECONDS)
    if not published:
        raise Refusal(f"the Ray cluster at {endpoint} has no dashboard, which runs jobs; start its head with one")
    return f"http://{published.decode()}"


def _preflight(url: str, credentials: authentication.Credentials) -> None:
    """Returns if a Ray dashboard answers at `url` and takes the token; raises Refusal otherwise."""
    what = f"the Ray dashboard at {without_credentials(url)}"
    parts = urlsplit(url)
    reachable(f"{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}", what)
    headers = {"Authorization": f"Bearer {credentials.token}"} if credentials.token else {}
    try:
        answer = requests.get(f"{url}/api/version", headers=headers, timeout=PREFLIGHT_SECONDS)
    except requests.RequestException as error:
        raise Refusal(f"{what} does not answer ({type(error).__name__}); its port is 8265 unless set") from error
    if answer.status_code in (401, 403):
        raise credentials.refused_by(what)
    if answer.status_code != 200 or "ray_version" not in answer.text:
        raise Refusal(f"{what} answers {answer.status_code} and is no Ray dashboard; its port is 8265 unless set")


def _command(entrypoint: list[str]) -> str:
    """`entrypoint` as the shell line that Ray runs.

    PATH on a node may name a Python without Ray (`ray start` from a virtual environment that was not activated); then
    the submitter's own is tried, which a shared machine or disk has too. It works in the submitter's directory where
    the node has that: Ray's own is replaced under its feet as soon as another raylet of the same machine unpacks it.
    """
    if entrypoint[:1] != ["python"]:
        return shlex.join(entrypoint)
    has_ray = "import importlib.util as u, sys; sys.exit(u.find_spec('ray') is None)"
    candidates = shlex.join(["python", "python3", sys.executable])
    arguments = shlex.join(["-P", *entrypoint[1:]])  # -P: the code is what was shipped, not what lies in the directory
    return (
        f"cd {shlex.quote(os.getcwd())} 2>/dev/null || cd; "
        f'for p in {candidates}; do "$p" -c {shlex.quote(has_ray)} 2>/dev/null && exec "$p" {arguments}; done; '
        f'echo "no Python with Ray on this node, tried: {candidates}" >&2; exit 127'
    )


def _stopping() -> dict[str, str]:
    """A stopped job gets what Ctrl-C is to a local run, and the time to end cleanly; Ray's own is SIGTERM and 3 s."""
    return {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}


def _follow(client: JobSubmissionClient, job_id: str, url: str, on_line: Callable[[str], None]) -> JobOutcome:
    lines = _Lines(on_line)
    try:
        try:
            _until_done(client, job_id, lines)
        except KeyboardInterrupt:
            on_line(f"Ctrl-C: stopping job {job_id} (at most {STOP_SECONDS} s; Ctrl-C again leaves it to itself)")
            _ask(client.stop_job, job_id)
            _until_done(client, job_id, lines)
        info = _ask(client.get_job_info, job_id)
    except _Lost as error:
        shown = without_credentials(url)
        raise Refusal(
            f"lost the Ray dashboard at {shown} while job {job_id} ran ({error}); the job "
            f"may go on: `ray job logs --address {shown} --follow {job_id}`"
        ) from error
    with contextlib.suppress(_Lost):  # the log went with the node that ran the job; its status is known all the same
        lines.finish(_ask(client.get_job_logs, job_id))
    if info.status == JobStatus.STOPPED:
        on_line(f"job {job_id} is stopped")
        return JobOutcome(job_id, info.status.value, INTERRUPTED)
    code = info.driver_exit_code
    if code is None and info.status == JobStatus.FAILED:
        on_line(f"job {job_id} failed before its command ended: {info.message}")
    return JobOutcome(job_id, info.status.value, code if code is not None else int(info.status == JobStatus.FAILED))


def _until_done(client: JobSubmissionClient, job_id: str, lines: "_Lines") -> None:
    """Returns when the job has ended; a broken connection is taken up again where it broke. Raises _Lost in the end."""
    failures = idle = 0
    while True:
        before = lines.passed
        try:
            asyncio.run(_tail(client, job_id, lines))
            if _ask(client.get_job_status, job_id).is_terminal():
                return
            failures = 0
        except _Lost:
            failures += 1
            if failures == LOST_AFTER:
                raise
        idle = 0 if lines.passed > before else idle + 1
        time.sleep(min(POLL_SECONDS * 2**idle, 5.0))


async def _tail(client: JobSubmissionClient, job_id: str, lines: "_Lines") -> None:
    """Passes the job's output on until the server closes the connection, at the job's end or before."""
    lines.restart()
    async with contextlib.aclosing(cast(AsyncGenerator[str], client.tail_job_logs(job_id))) as chunks:
        while True:
            try:
                chunk = await anext(chunks, None)
            except LOST as error:
                raise _Lost(type(error).__name__) from error
            if chunk is None:
                return
            lines.feed(chunk)


def _ask(request: Callable[[str], T], job_id: str) -> T:
    """The server's answer. Raises _Lost for failures of the server, which keeps them apart from the caller's own."""
    try:
        return request(job_id)
    except LOST as error:
        raise _Lost(type(error).__name__) from error


class _Lost(Exception):
    """The dashboard does not answer any more."""


class _Lines:
    """Passes whole lines on, each once, from a log that is sent from its beginning on every connection."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self.on_line = on_line
        self.passed = 0  # characters of the log seen so far, over all connections
        self.position = 0  # in this connection
        self.partial = ""

    def restart(self) -> None:
        self.position = 0

    def feed(self, chunk: str) -> None:
        fresh = chunk[max(0, self.passed - self.position) :]
        self.position += len(chunk)
        self.passed = max(self.passed, self.position)
        *whole, self.partial = (self.partial + fresh).split("\n")
        for line in whole:
            self.on_line(line)

    def finish(self, log: str) -> None:
        """Takes the complete log for what came after the last chunk, and ends a last line that has no newline."""
        self.restart()
        self.feed(log)
        if self.partial:
            self.on_line(self.partial)
            self.partial = ""
