"""The package that Ray ships to every node: the driver's own code, and the user's modules that a run needs."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import espalier
from espalier.cluster.connection.folders import own_folder

PACKAGE = "espalier"
LEFT_OUT = ("__pycache__", "*.pyc", ".*", "mlflow.db", "mlruns")
DEMO_MODEL = ("demo", "model")  # megabytes that only `espalier demo` reads


def root() -> Path:
    """The directory that holds the package, in a clone as in site-packages. (In a clone its rooms are links.)"""
    return Path(espalier.__file__).parent


@contextlib.contextmanager
def staged(*, demo_model: bool, own: Mapping[str, Path]) -> Iterator[Path]:
    """A temporary directory with the package, and the files in `own` under these names; nothing else.

    Ray uploads a whole directory; the root may be a clone with a .venv and checkpoints, or all of site-packages.
    Equal code gives an equal upload, which Ray then skips.
    """

    def ignore(directory: str, names: list[str]) -> set[str]:
        dropped = set(shutil.ignore_patterns(*LEFT_OUT)(directory, names))
        if not demo_model and Path(directory).name == DEMO_MODEL[0]:
            dropped.add(DEMO_MODEL[1])
        return dropped

    with own_folder() as folder:
        code = folder / "code"
        shutil.copytree(root(), code / PACKAGE, ignore=ignore)
        for name, file in own.items():
            (code / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, code / name)
        yield code
