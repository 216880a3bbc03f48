"""Temporary folders, removed when their process ends; if it was killed, by the next run on the machine."""

import contextlib
import fcntl
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from espalier.cluster.connection.watchdog import sweep

PREFIX = "espalier-"
LOCK = "lock"  # held for as long as the owner lives
UNLOCKED_SECONDS = 60.0  # the age at which a folder without a lock counts as left by an owner that was killed


@contextlib.contextmanager
def own_folder(parent: Path | None = None) -> Iterator[Path]:
    """A private folder for the block, in `parent` or the usual place; those of owners that were killed go first."""
    parent = parent or Path(tempfile.gettempdir())
    for left in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # locked, or somebody else's: not ours to remove
            _remove_if_left(left)
    home = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        with open(home / LOCK, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _remove_if_left(folder: Path) -> None:
    """Remove the folder, and end what is at work in it. Raises OSError if its owner lives."""
    if not (folder / LOCK).exists():
        if not folder.is_dir() or time.time() - folder.stat().st_mtime < UNLOCKED_SECONDS:
            return
        (folder / LOCK).touch()
    with open(folder / LOCK) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        sweep(folder)
        shutil.rmtree(folder)
