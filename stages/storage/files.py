"""How files come to be: whole or not there, on disk when they are, and to be read by whom the umask lets read."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

READ_CHUNK = 16 << 20  # bytes hashed at a time


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, for whatever writes a file there; on leaving, the file becomes `path`.

    It is synced, has the mode of any new file (0666 less the umask; some writers make theirs 0600), and takes its name
    in one step that survives a power cut. After an exception the temporary file is gone and `path` as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        mode = _mode_of_a_new_file(temporary)
        yield temporary
        os.chmod(temporary, mode)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def clear_unfinished(path: Path) -> None:
    """Remove what was on its way to become `path` when its writer was killed. For who alone writes that file."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink(missing_ok=True)


def share(directory: Path) -> None:
    """Give all files in `directory` the mode of any new file: for those whose writer makes them 0600."""
    probe = directory / f".mode.{os.getpid()}.tmp"
    mode = _mode_of_a_new_file(probe)
    probe.unlink()
    for path in directory.iterdir():
        if path.is_file():
            path.chmod(mode)


def _mode_of_a_new_file(path: Path) -> int:
    """That of `path`, which is made; to ask for the umask would be to change it for all threads."""
    with path.open("wb") as file:
        return os.fstat(file.fileno()).st_mode & 0o777


def move_into_place(gathered: Path, final: Path) -> None:
    """Give what was gathered, a file or a directory, its final name in one step, synced; a directory that had the name
    is gone. Both lie on one file system."""
    for path in [gathered, *gathered.rglob("*")]:
        sync(path)
    if final.is_dir():
        shutil.rmtree(final)
    os.replace(gathered, final)
    sync(final.parent)


def write_text(path: Path, text: str) -> None:
    """Write a small file, UTF-8, in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Make what a file holds, or a rename in a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """`sha256:...` of a file, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(READ_CHUNK):
            digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def is_full(error: Exception) -> bool:
    """Whether a failed write says that the disk, or a quota on it, is full."""
    text = str(error)  # safetensors passes the number on in words
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left" in text or f"os error {errno.ENOSPC}" in text or f"os error {errno.EDQUOT}" in text
