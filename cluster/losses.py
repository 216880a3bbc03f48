"""Why a Ray actor died: Ray's own reason, and the last line of the process's log where that is on this machine. And how
an actor ends itself when its device is lost."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray._private.worker

from espalier.stages.device_errors import context_lost
from espalier.stages.errors import DeviceLost, first_line


@contextmanager
def ending_with_its_device() -> Iterator[None]:
    """Within it an error that leaves this process without its device (see `context_lost`) ends the process, with a last
    word: whatever it was asked next would fail with the same error. Ray, or whoever started it, makes another."""
    try:
        yield
    except RuntimeError as error:
        if not context_lost(error):
            raise
        sys.stderr.write(f"{' '.join(str(error).split())[:300]}\n")
        sys.stderr.flush()
        os._exit(1)


def cause_of(error: Exception) -> str:
    """One line: how the process ended, and the last line that it wrote on stderr."""
    ended = re.search(r"Worker exit type: (.*?)\.(?= |$)", " ".join(str(error).split()))
    return "; ".join([ended[1] if ended else first_line(error), *_last_said(error)])


def given_up(times: int, last: Exception) -> str:
    """What a run says that has lost shards so many times, with nothing done between."""
    remedy = (
        "the device, its driver or a criterion of one's own is at fault: see that node's kernel log (Xid), leave the "
        "node out, then resume"
        if isinstance(last, DeviceLost)
        else "likely out of memory: use more shards, --resident one or a smaller --spool-memory, then resume"
    )
    return f"a shard was lost {times} times with no block finished between ({cause_of(last)}); {remedy}"


def _last_said(error: Exception) -> list[str]:
    node, pid = ray._private.worker._global_node, re.search(r"pid: (\d+)", str(error))
    if node is None or pid is None:
        return []
    for log in Path(node.get_logs_dir_path()).glob(f"worker-*-{pid[1]}.err"):
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return [f"it said: {lines[-1][:300]}"] if lines else []
    return []
