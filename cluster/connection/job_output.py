"""A job's output followed to its end over Ray's client: each line once, however often the connection breaks."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Callable
from typing import TypeVar, cast

import aiohttp
import requests
from ray.job_submission import JobStatus, JobSubmissionClient

from espalier.cluster.connection.redact import without_secrets

POLL_SECONDS = 0.3
LOST_AFTER = 5  # attempts in a row that fail before the server counts as gone
WAITING_SECONDS = 10  # before what a job that has not started waits for is said
LOST = (ConnectionError, OSError, RuntimeError, requests.RequestException, aiohttp.ClientError)
T = TypeVar("T")


class Lost(Exception):
    """The dashboard does not answer any more."""


def asked(request: Callable[[str], T], job_id: str) -> T:
    """The server's answer. Raises Lost for failures of the server, which keeps them apart from the caller's own."""
    try:
        return request(job_id)
    except LOST as error:
        raise Lost(type(error).__name__) from error


def pass_on(client: JobSubmissionClient, job_id: str, on_line: Callable[[str], None]) -> None:
    """Returns when the job has ended, each whole line of its output passed to `on_line` once, without secrets, and
    before them what it waits for, if it does not start.

    A broken connection is taken up again where it broke. Raises Lost when that fails LOST_AFTER times in a row.
    """
    lines, failures, idle = Lines(on_line), 0, 0
    say_at = time.monotonic() + WAITING_SECONDS
    while True:
        before, info = lines.passed, None
        try:
            info = asked(client.get_job_info, job_id)
            if info.status != JobStatus.PENDING:  # of one that is, Ray would tail the output without an end
                asyncio.run(_tail(client, job_id, lines))
                info = asked(client.get_job_info, job_id)
            elif time.monotonic() > say_at:
                on_line(f"job {job_id} has not started: {' '.join((info.message or 'no reason given').split())}")
                say_at = math.inf
            if info.status.is_terminal():
                break
            failures = 0
        except Lost:
            failures += 1
            if failures == LOST_AFTER:
                raise
        idle = 0 if lines.passed > before or info is None or info.status == JobStatus.PENDING else idle + 1
        time.sleep(min(POLL_SECONDS * 2**idle, 5.0))
    with contextlib.suppress(Lost):  # the log went with the node that ran the job; its status is known all the same
        lines.finish(asked(client.get_job_logs, job_id))


async def _tail(client: JobSubmissionClient, job_id: str, lines: "Lines") -> None:
    """Passes the job's output on until the server closes the connection, at the job's end or before."""
    lines.restart()
    async with contextlib.aclosing(cast(AsyncGenerator[str], client.tail_job_logs(job_id))) as chunks:
        while True:
            try:
                chunk = await anext(chunks, None)
            except LOST as error:
                raise Lost(type(error).__name__) from error
            if chunk is None:
                return
            lines.feed(chunk)


class Lines:
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
            self.on_line(without_secrets(line))

    def finish(self, log: str) -> None:
        """Takes the complete log for what came after the last chunk, and ends a last line that has no newline."""
        self.restart()
        self.feed(log)
        if self.partial:
            self.on_line(without_secrets(self.partial))
            self.partial = ""
