"""The package that Ray ships to every node: the driver's own code, and the user's modules that a run needs."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import espalier
from espalier.cluster.connection.folders import own_folder
from espalier.stages.errors import Refusal

PACKAGE = "espalier"
LEFT_OUT = ("__pycache__", "*.pyc", ".*", "mlflow.db", "mlruns")
WORKING_DIR = "working_dir"  # beside the package, a folder that the user sends along: apart, as it may hold a package
MOST_SHIPPED = 100 << 20  # bytes of that folder: Ray's dashboard takes no larger upload
DEMO_MODEL = ("demo", "model")  # megabytes that only `espalier demo` reads


def root() -> Path:
    """The directory that holds the package, in a clone as in site-packages. (In a clone its rooms are links.)"""
    return Path(espalier.__file__).parent


@contextlib.contextmanager
def staged(*, demo_model: bool, own: Mapping[str, Path], folder: Path | None = None) -> Iterator[Path]:
    """A temporary directory with the package, the files in `own` under these names, and `folder` as WORKING_DIR.

    Ray uploads a whole directory; the root may be a clone with a .venv and checkpoints, or all of site-packages.
    Equal code gives an equal upload, which Ray then skips.
    Raises Refusal for a `folder` that is none, or too large to be sent.
    """

    def ignore(directory: str, names: list[str]) -> set[str]:
        dropped = set(shutil.ignore_patterns(*LEFT_OUT)(directory, names))
        if not demo_model and Path(directory).name == DEMO_MODEL[0]:
            dropped.add(DEMO_MODEL[1])
        return dropped

    with own_folder() as home:
        code = home / "code"
        shutil.copytree(root(), code / PACKAGE, ignore=ignore)
        for name, file in own.items():
            (code / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, code / name)
        if folder is not None:
            _check_size(folder)
            shutil.copytree(folder, code / WORKING_DIR, ignore=shutil.ignore_patterns(*LEFT_OUT))
        yield code


def _check_size(folder: Path) -> None:
    if not folder.is_dir():
        raise Refusal(f"--working-dir {folder}: no such folder")
    left_out = shutil.ignore_patterns(*LEFT_OUT)
    total = 0
    for place, folders, files in os.walk(folder, followlinks=True):
        dropped = left_out(place, [*folders, *files])
        folders[:] = [name for name in folders if name not in dropped]
        total += sum((Path(place) / name).stat().st_size for name in files if name not in dropped)
    if total > MOST_SHIPPED:
        raise Refusal(
            f"--working-dir {folder}: {total / 2**20:,.0f} MiB, and a job takes at most {MOST_SHIPPED >> 20} along; "
            "models and data belong on storage that the nodes share"
        )
