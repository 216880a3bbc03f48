"""Ends what a local Ray cluster leaves when its driver is killed: a process of its own, which outlives the driver.

Usage: watchdog.py HOME, with a pipe from the driver as standard input. It acts when that closes, or the driver is gone:
what of the cluster is alive then is killed, and HOME removed. Ray's processes die with the driver or look for each
other for a minute; their files stay for ever.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

TOKEN_FILE = "auth_token"  # in HOME; Ray's processes are started with its path in their environment
POLL_SECONDS = 1.0
SWEEP_SECONDS = 10.0

_homes: list[Path] = []  # of this process's clusters, for `end_clusters`


@contextlib.contextmanager
def watched(home: Path) -> Iterator[None]:
    """Within it, a watchdog; at the end nothing of the cluster in `home` is alive any more."""
    command = [sys.executable, "-P", __file__, str(home)]
    null = subprocess.DEVNULL
    # In a session of its own: what a terminal or a batch system sends to the driver's group does not reach it.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=null, stderr=null, start_new_session=True) as process:
        _homes.append(home)
        try:
            yield
        finally:
            sweep(home)
            _homes.remove(home)
            process.kill()


def end_clusters() -> None:
    """End the clusters that this process watches, when it has no time left to shut them down."""
    for home in list(_homes):
        sweep(home)
        shutil.rmtree(home, ignore_errors=True)


def members(home: Path) -> Iterator[psutil.Process]:
    """The live processes of the cluster whose files are in `home`, but for the one that asks."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # gone by now, or another user's
            if process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE and _is_member(process, home):
                yield process


def _is_member(process: psutil.Process, home: Path) -> bool:
    if not any("/ray/" in part or part.startswith("ray::") for part in process.cmdline()):
        return False  # a command that the driver has started, say, whose environment it gave on
    if process.environ().get("RAY_AUTH_TOKEN_PATH") == str(home / TOKEN_FILE):
        return True
    # An agent of Ray has written its title over its environment.
    return any(Path(file.path).is_relative_to(home) for file in process.open_files())


def sweep(home: Path) -> None:
    """Kill all `members`, those too that others start meanwhile."""
    give_up = time.monotonic() + SWEEP_SECONDS
    while (found := list(members(home))) and time.monotonic() < give_up:
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=1)


def _watch(home: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    driver = os.getppid()
    while os.getppid() == driver and not select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
        pass
    sweep(home)
    shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    _watch(Path(sys.argv[1]))
