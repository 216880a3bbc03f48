"""Commands as Ray jobs: this project shipped along, output followed to the end, the exit code handed back; and jobs
looked at, followed and stopped later.

Over Ray's own client, which leaves three things to its caller: it starts with authentication off, it prefers
RAY_ADDRESS to the address it is given, and it waits without a limit for a server that does not answer.
"""

import contextlib
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from ray.runtime_env import RuntimeEnv

from espalier.cluster.connection import authentication
from espalier.cluster.connection import code_package as package
from espalier.cluster.connection.connect import NOTHING, endpoint_of, probe, reachable
from espalier.cluster.connection.job_output import POLL_SECONDS, Lost, asked, pass_on
from espalier.cluster.connection.redact import is_secret, storable, without_credentials, without_secrets
from espalier.stages.errors import Refusal, first_line, unknown

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
PREFLIGHT_SECONDS = 5.0
READY_SECONDS = 20  # for the agent that makes jobs, which comes up seconds after its node
STOP_SECONDS = 30  # between the job's SIGINT and its SIGKILL: a run closes its journal and says how to resume
STOPPED_SECONDS = STOP_SECONDS + 15  # for Ray to say that a job is stopped
UNSTARTED_SECONDS = 10  # for one that has no process to stop yet
INTERRUPTED = 130  # what a shell reports for a command ended by Ctrl-C
SHIPPED = "\0"  # within an argument: the job's own copy of --working-dir. No argument of a command line can hold it
COMMAND = "espalier"  # under which a job's metadata have the command that it is
CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)


@dataclass(frozen=True)
class JobOutcome:
    """What became of a job. `exit_code` is its entrypoint's, 130 if it was stopped, None while nobody waited for it."""

    job_id: str
    status: str
    exit_code: int | None


@dataclass(frozen=True)
class JobState:
    """A job as Ray knows it: times in UTC, `seconds` that it runs or ran, `exit_code` of its entrypoint if it ended."""

    id: str
    status: str
    command: str
    started: str | None
    seconds: float | None
    exit_code: int | None
    message: str


@dataclass(frozen=True)
class JobNeeds:
    """What a job brings and asks for beside its command: a folder of files, fields of Ray's runtime environment, and
    CPUs, GPUs and bytes of memory for the process of the command alone, which its shards ask for besides."""

    working_dir: Path | None = None
    runtime_env: Mapping[str, Any] = field(default_factory=dict)
    cpus: float | None = None
    gpus: float | None = None
    memory: int | None = None


NOTHING_MORE = JobNeeds()


def submit(
    entrypoint: list[str],
    *,
    address: str | None,
    env: dict[str, str],
    on_line: Callable[[str], None],
    follow: bool = True,
    own: Mapping[str, Path] = NOTHING,
    needs: JobNeeds = NOTHING_MORE,
) -> JobOutcome:
    """Runs `entrypoint` on the cluster and gives its outcome, with each line of its output passed to `on_line`.

    `address` is the dashboard's ("http://host:8265"), the cluster's ("host:6379", "auto"), or None for
    RAY_API_SERVER_ADDRESS, RAY_ADDRESS or port 8265 here. The job runs in a copy of this project's three packages and
    of the files in `own` (names there -> files here), so paths in it must be absolute, or within `needs.working_dir`
    and written SHIPPED/path; `env` is set for it and its workers. The token is not sent along: the nodes have it. An
    entrypoint that begins with "python" runs in a Python that has Ray. Ctrl-C leaves the job to itself, and is raised
    with a note that says how to follow or stop it.
    Raises Refusal within ten seconds where no dashboard answers or the token is not accepted.
    """
    with _client(address) as (client, url):
        with package.staged(demo_model=True, own=own, folder=needs.working_dir) as code:
            variables = {**_stopping(), **env, **needs.runtime_env.get("env_vars", {})}
            job_id = _accepted(client, url, entrypoint, needs, {"working_dir": str(code), "env_vars": variables})
        on_line(f"job {job_id} submitted to {without_credentials(url)}")
        if not follow:
            on_line(_how_to_look(job_id, url))
            return JobOutcome(job_id, str(client.get_job_status(job_id)), None)
        return _followed(client, job_id, url, on_line)


def states(address: str | None) -> list[JobState]:
    """Every job that was submitted to the cluster at `address` (see `submit`), the newest first."""
    with _client(address) as (client, _):
        jobs = [_state(info) for info in client.list_jobs() if info.submission_id]
        return sorted(jobs, key=lambda job: job.started or "", reverse=True)


def state(job_id: str, address: str | None) -> JobState:
    """One job of the cluster at `address`. Raises Refusal if it has none of that id."""
    with _client(address) as (client, url):
        return _state(_known(client, job_id, url))


def logs(job_id: str, address: str | None, *, follow: bool, on_line: Callable[[str], None]) -> JobOutcome:
    """Passes the job's output so far to `on_line`; with `follow` all of it, to the job's end.

    Ctrl-C is as for `submit`. Raises Refusal if the cluster has no job of that id.
    """
    with _client(address) as (client, url):
        info = _known(client, job_id, url)
        if follow:
            return _followed(client, job_id, url, on_line)
        for line in client.get_job_logs(job_id).splitlines():
            on_line(without_secrets(line))
        return JobOutcome(job_id, info.status.value, None)


def stop(job_id: str, address: str | None) -> JobState:
    """The job, stopped as Ctrl-C stops a command, or as it ended before. Waits for its end.

    Raises Refusal if the cluster has no job of that id, or does not get it to end.
    """
    with _client(address) as (client, url):
        _known(client, job_id, url)
        with contextlib.suppress(Lost):  # of a job that ended meanwhile
            asked(client.stop_job, job_id)
        told = time.monotonic()
        while not (info := client.get_job_info(job_id)).status.is_terminal():
            waited, pending = time.monotonic() - told, info.status == JobStatus.PENDING
            if waited > (UNSTARTED_SECONDS if pending else STOPPED_SECONDS):
                why = (
                    "still waits for room, with no process to stop; told now, it will end as soon as it has begun"
                    if pending
                    else f"still runs, {waited:.0f} s after it was told to stop; is its node alive (`ray status`)?"
                )
                raise Refusal(f"job {job_id} {why}")
            time.sleep(POLL_SECONDS)
        return _state(info)


def checked_runtime_env(fields: dict[str, Any], source: str) -> dict[str, Any]:
    """`fields` of Ray's runtime environment, of the file `source`. Raises Refusal for one that Ray does not have or
    that is said otherwise here, and for a secret."""
    for name in fields:
        if name not in RuntimeEnv.known_fields:
            raise Refusal(f"--runtime-env {source}: {name} {unknown(name, RuntimeEnv.known_fields)}")
        if name in ("working_dir", "excludes"):
            raise Refusal(f"--runtime-env {source}: {name}: leave it out; --working-dir says which folder goes along")
    variables = fields.get("env_vars") or {}
    secret = [name for name in variables if is_secret(str(name))] if isinstance(variables, dict) else []
    if secret or storable(fields) != fields:
        what = f"env_vars {', '.join(secret)}" if secret else "a URI in it"
        raise Refusal(
            f"--runtime-env {source}: {what} holds a secret, and Ray shows a job's runtime environment on its "
            "dashboard; set it in the environment of the nodes"
        )
    return fields


@contextlib.contextmanager
def _client(address: str | None) -> Iterator[tuple[JobSubmissionClient, str]]:
    """Ray's client for the dashboard behind `address`, with the token, and the dashboard's URL."""
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)
    url, credentials = dashboard(address)
    settings = {**credentials.environment, "RAY_ADDRESS": None, "RAY_API_SERVER_ADDRESS": None}
    with authentication.ray_environment(settings):
        yield JobSubmissionClient(url), url


def _accepted(
    client: JobSubmissionClient, url: str, entrypoint: list[str], needs: JobNeeds, ours: dict[str, Any]
) -> str:
    """The id of the new job. A cluster that has just started is given time for its first node."""
    give_up = time.monotonic() + READY_SECONDS
    while True:
        try:
            return client.submit_job(
                entrypoint=_command(entrypoint, inside=needs.working_dir is not None),
                runtime_env={**needs.runtime_env, **ours},
                metadata={COMMAND: _title(entrypoint)},
                entrypoint_num_cpus=needs.cpus,
                entrypoint_num_gpus=needs.gpus,
                entrypoint_memory=needs.memory,
            )
        except (TypeError, ValueError) as error:  # what Ray says of a runtime environment
            raise Refusal(f"--runtime-env: {without_secrets(first_line(error))}") from error
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            if time.monotonic() > give_up:
                raise Refusal(
                    f"the Ray cluster at {without_credentials(url)} has no node that takes jobs, for {READY_SECONDS} s "
                    "now; are its nodes alive (`ray status`), and did they start with the dashboard's agent?"
                ) from error
        time.sleep(1)


def _known(client: JobSubmissionClient, job_id: str, url: str) -> JobDetails:
    """What Ray says of the job. Raises Refusal if there is none."""
    try:
        return client.get_job_info(job_id)
    except RuntimeError as error:
        if "status code 404" not in str(error):
            raise
        shown = without_credentials(url)
        raise Refusal(
            f"job {job_id}: the Ray cluster at {shown} has none of that id; `espalier submit status --address {shown}` "
            "lists those it has"
        ) from error


def _state(info: JobDetails) -> JobState:
    """Times are in milliseconds since 1970 in `info`."""
    begun, ended = (None if at is None else at / 1000 for at in (info.start_time, info.end_time))
    return JobState(
        id=info.submission_id or info.job_id or "",
        status=info.status.value,
        command=without_secrets((info.metadata or {}).get(COMMAND) or info.entrypoint),
        started=datetime.fromtimestamp(begun, UTC).isoformat(timespec="seconds") if begun else None,
        seconds=round((ended or time.time()) - begun, 1) if begun else None,
        exit_code=info.driver_exit_code,
        message=without_secrets(" ".join((info.message or "").split())),
    )


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


def _command(entrypoint: list[str], *, inside: bool) -> str:
    """`entrypoint` as the shell line that Ray runs.

    PATH on a node may name a Python without Ray (`ray start` from a virtual environment that was not activated); then
    the submitter's own is tried, which a shared machine or disk has too. It works in its copy of --working-dir
    (`inside`), else in the submitter's directory where the node has that: the folder that Ray starts it in is replaced
    under its feet as soon as another raylet of the same machine unpacks it.
    """
    files = f'files="$PWD/{package.WORKING_DIR}"; ' if inside else ""
    if entrypoint[:1] != ["python"]:
        return files + " ".join(map(_quoted, entrypoint))
    has_ray = "import importlib.util as u, sys; sys.exit(u.find_spec('ray') is None)"
    candidates = shlex.join(["python", "python3", sys.executable])
    arguments = " ".join(map(_quoted, ["-P", *entrypoint[1:]]))  # -P: the code is what was shipped, not what lies there
    place = 'cd "$files"' if inside else f"cd {shlex.quote(os.getcwd())} 2>/dev/null || cd"
    return (
        f"{files}{place}; "
        f'for p in {candidates}; do "$p" -c {shlex.quote(has_ray)} 2>/dev/null && exec "$p" {arguments}; done; '
        f'echo "no Python with Ray on this node, tried: {candidates}" >&2; exit 127'
    )


def _quoted(argument: str) -> str:
    """`argument` for the shell, with the job's copy of --working-dir where it says SHIPPED."""
    before, shipped, after = argument.partition(SHIPPED)
    return f'{shlex.quote(before)}"$files"{shlex.quote(after)}' if shipped else shlex.quote(argument)


def _title(entrypoint: list[str]) -> str:
    """`entrypoint` as its owner wrote it."""
    ours = entrypoint[:3] == ["python", "-m", "espalier"]
    words = ["espalier", *entrypoint[3:]] if ours else entrypoint
    return shlex.join(word.replace(SHIPPED, "WORKING_DIR") for word in words)


def _stopping() -> dict[str, str]:
    """A stopped job gets what Ctrl-C is to a local run, and the time to end cleanly; Ray's own is SIGTERM and 3 s."""
    return {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}


def _followed(client: JobSubmissionClient, job_id: str, url: str, on_line: Callable[[str], None]) -> JobOutcome:
    try:
        pass_on(client, job_id, on_line)
        info = asked(client.get_job_info, job_id)
    except KeyboardInterrupt as stop:
        stop.add_note(f"job {job_id} goes on; {_how_to_look(job_id, url)}")
        raise
    except Lost as error:
        raise Refusal(
            f"lost the Ray dashboard at {without_credentials(url)} while job {job_id} ran ({error}); the job may go "
            f"on; {_how_to_look(job_id, url)}"
        ) from error
    if info.status == JobStatus.STOPPED:
        on_line(f"job {job_id} is stopped")
        return JobOutcome(job_id, info.status.value, INTERRUPTED)
    code = info.driver_exit_code
    if code is None and info.status == JobStatus.FAILED:
        on_line(f"job {job_id} failed before its command ended: {without_secrets(info.message or 'no reason given')}")
    return JobOutcome(job_id, info.status.value, code if code is not None else int(info.status == JobStatus.FAILED))


def _how_to_look(job_id: str, url: str) -> str:
    where = f"{job_id} --address {without_credentials(url)}"
    return f"`espalier submit logs -f {where}` follows it, `espalier submit stop {where}` ends it"
