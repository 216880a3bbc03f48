"""The text every Python has: the standard library's own sources, in three parts that share no file.

A file's part follows from the SHA-256 of its name, so it is the same on every machine and in every Python version:
what the demo calibrates and evaluates on was never trained on, even under a Python newer than the model.
"""

import hashlib
import os
import sysconfig
from pathlib import Path
from typing import Literal

from espalier.stages.errors import Refusal

Part = Literal["training", "calibration", "held-out"]

LARGEST_FILE = 200_000  # bytes; beyond it are tables (Unicode names, the pydoc topics), not code
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}
BUILD_SETTINGS = ("_sysconfigdata", "config-")  # they differ from machine to machine
HELD_OUT_PERCENT = 4
CALIBRATION_PERCENT = 6


def part_of(name: str) -> Part:
    """The part that the file with this relative name belongs to, by its hash alone."""
    percentile = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
    if percentile < HELD_OUT_PERCENT:
        return "held-out"
    return "calibration" if percentile < HELD_OUT_PERCENT + CALIBRATION_PERCENT else "training"


def files(part: Part, root: Path | None = None) -> list[str]:
    """The texts of one part, sorted by file name, each headed by a line `# file: relative/name.py`.

    `root` is where the sources lie (default: this Python's standard library). Refuses where there are none to read.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    names = [name for name in _source_names(root) if part_of(name) == part]
    texts = [f"# file: {name}\n{text}\n" for name in names if (text := _code(root / name))]
    if not texts:
        raise Refusal(
            f"{root}: no {part} text in this Python's standard library (some distributions strip its sources); "
            "use a Python that has them, such as one from python.org, Debian or uv"
        )
    return texts


def training_text() -> str:
    """About nine tenths of the standard library: what the demo model learned from."""
    return "".join(files("training"))


def calibration_text() -> str:
    """About 6 % of the standard library's files, none of them trained on."""
    return "".join(files("calibration"))


def held_out_text() -> str:
    """About 4 % of the standard library's files, none of them trained on or calibrated with."""
    return "".join(files("held-out"))


def write_texts(directory: Path, calibration_bytes: int, held_out_bytes: int) -> tuple[Path, Path]:
    """The paths of calibration.txt and held-out.txt, written into `directory`, each no longer than asked for.

    Both are cut at line ends and take something from every file of their part; a part below its limit is written whole.
    """
    directory.mkdir(parents=True, exist_ok=True)
    calibration, held_out = directory / "calibration.txt", directory / "held-out.txt"
    calibration.write_bytes(_openings(files("calibration"), calibration_bytes))
    held_out.write_bytes(_openings(files("held-out"), held_out_bytes))
    return calibration, held_out


def _source_names(root: Path) -> list[str]:
    """The names relative to `root` of the source files that count, sorted."""
    names = []
    for folder, subfolders, file_names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        names += [(Path(folder) / name).relative_to(root).as_posix() for name in file_names if name.endswith(".py")]
    return sorted(name for name in names if not name.startswith(BUILD_SETTINGS))


def _code(path: Path) -> str:
    """The file's text, or nothing where it is no UTF-8 or too large to be code."""
    source = path.read_bytes()
    if len(source) > LARGEST_FILE:
        return ""
    try:
        return source.decode("utf-8").replace("\r\n", "\n").strip("\n")
    except UnicodeDecodeError:
        return ""


def _openings(texts: list[str], limit: int) -> bytes:
    """The first lines of every text, in order, at most `limit` bytes in all; long texts get what short ones leave."""
    encoded = [text.encode() for text in texts]
    shares = [0] * len(encoded)
    by_length = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    for done, index in enumerate(by_length):
        share = min(len(encoded[index]), limit // (len(encoded) - done))
        shares[index] = encoded[index].rfind(b"\n", 0, share) + 1
        limit -= shares[index]
    return b"".join(text[:share] for text, share in zip(encoded, shares, strict=True))
