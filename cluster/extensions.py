"""The C++ parts of DeepSpeed: compiled once a machine, before any rank starts, where later runs find them."""

import importlib.metadata
import os
import shutil
import sys
import time
from pathlib import Path

from stages.errors import Refusal

DIRECTORY = "TORCH_EXTENSIONS_DIR"  # where torch builds; the user's own is taken as it is


def directory() -> Path:
    """Where extensions are kept: a directory of these versions of Python, torch and DeepSpeed alone."""
    if os.environ.get(DIRECTORY):
        return Path(os.environ[DIRECTORY])
    versions = [importlib.metadata.version(package) for package in ("torch", "deepspeed")]
    name = f"python{sys.version_info[0]}.{sys.version_info[1]}-torch{versions[0]}-deepspeed{versions[1]}"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "espalier" / "extensions" / name


def environment() -> dict[str, str]:
    """What a process needs in order to find the extensions, and the ninja that pip installed beside its Python."""
    return {DIRECTORY: str(directory()), "PATH": search_path()}


def check_compiler(offload: bool, cpu: bool) -> None:
    """Raises Refusal, naming the package to install, where extensions are wanted and a C++ compiler or ninja lacks."""
    if not wanted(offload, cpu):
        return
    compiler = os.environ.get("CXX", "c++")
    for what, program, package in (("C++ compiler", compiler, "g++"), ("ninja", "ninja", "ninja-build")):
        if shutil.which(program, path=search_path()) is None:
            raise Refusal(
                f"no {what} ({program}) on this machine: DeepSpeed compiles its extensions with it; "
                f"apt-get install {package}, or your system's package of that name"
            )


def wanted(offload: bool, cpu: bool) -> list[str]:
    """The extensions that ranks use: on CPUs to reduce through shared memory, for offloading Adam on the CPU."""
    return [*(["deepspeed_shm_comm"] if cpu else []), *(["cpu_adam"] if offload else [])]


def is_built(offload: bool, cpu: bool) -> bool:
    """Whether an earlier run compiled what is wanted."""
    return all((directory() / name / f"{name}.so").exists() for name in wanted(offload, cpu))


def build(offload: bool, cpu: bool) -> float:
    """Compile what is not compiled yet, and load it; the seconds that took. In a process with `environment`."""
    from stages.engine import build_extensions

    check_compiler(offload, cpu)
    directory().mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    build_extensions(offload)
    return time.perf_counter() - started


def search_path() -> str:
    """Where compilers are looked for: PATH, and beside this Python, where pip puts ninja."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
