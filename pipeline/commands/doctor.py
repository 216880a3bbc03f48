"""What works on this machine, what will be slow, and what is missing: `espalier doctor`, within a few seconds.

Nothing is changed and nothing is asked over the network but the MLflow server, where one is configured. The value of a
token or a password is never read into a finding.
"""

import importlib.metadata
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.table import Table
from rich.text import Text

from espalier.cluster.connection.authentication import DEFAULT_TOKEN_PATH, TOKEN, TOKEN_PATH, find_credentials
from espalier.cluster.connection.redact import without_credentials, without_secrets
from espalier.pipeline.planning import hardware as machine
from espalier.pipeline.record.mlflow_client import default_tracking_uri, sqlite_path
from espalier.stages.errors import Refusal

if TYPE_CHECKING:
    import torch

State = Literal["ok", "slow", "missing"]
DISTRIBUTION = "espalier-llm"
GIB = 1 << 30
LITTLE_MEMORY = 4 * GIB  # the driver takes about 1, a shard of a small model about 2
LITTLE_DISK = 1 * GIB  # the bundled demo writes less
RAY_STORE_SHARE, RAY_STORE_MOST = 0.3, 10_000_000_000  # of the memory; beyond the second Ray takes what there is
COLOURS: dict[State, str] = {"ok": "green", "slow": "yellow", "missing": "red"}


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what was found, whether it will do, and what to do about it if not."""

    name: str
    value: str
    state: State = "ok"
    remedy: str | None = None
    required: bool = False  # without it `espalier prune` cannot run on this machine


def examine(*subjects: str) -> list[Finding]:
    """What was looked at, in the order in which a reader would ask: everything in CHECKS, or those of its subjects."""
    findings: list[Finding] = []
    for subject in subjects or CHECKS:
        try:
            findings += CHECKS[subject]()
        except Exception as error:  # one broken part of a machine must not hide what is known of the others
            findings.append(
                Finding(subject, without_secrets(f"could not be examined: {type(error).__name__}: {error}"), "missing")
            )
    return findings


def exit_code(findings: list[Finding]) -> int:
    """0 when nothing required is missing, else 1."""
    return int(any(finding.required and finding.state == "missing" for finding in findings))


def render(findings: list[Finding]) -> Table:
    """The findings as a table for a terminal, a remedy under each value that needs one."""
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("what", no_wrap=True)
    table.add_column("found", overflow="fold")
    for finding in findings:
        found = Text(finding.value)
        if finding.remedy:
            found.append(f"\n→ {finding.remedy}", style=COLOURS[finding.state])
        table.add_row(Text(finding.state, style=COLOURS[finding.state]), Text(finding.name), found)
    return table


def _packages() -> list[Finding]:
    try:
        about = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return [Finding(DISTRIBUTION, "not installed", "missing", "pip install -e . in its repository", True)]
    python = ".".join(map(str, sys.version_info[:3]))
    wanted = about.metadata["Requires-Python"] or ""
    findings = [Finding(DISTRIBUTION, about.version), _version("Python", python, wanted, f"use Python {wanted}")]
    for line in about.requires or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        remedy = f'pip install "{requirement.name}{requirement.specifier}"'
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(requirement.name, "not installed", "missing", remedy, True))
        else:
            findings.append(_version(requirement.name, version, str(requirement.specifier), remedy))
    return findings


def _version(name: str, version: str, wanted: str, remedy: str) -> Finding:
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Finding(name, version, required=True)
    return Finding(name, f"{version}, not {wanted}", "missing", remedy, True)


def _devices() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        if Path("/dev/nvidia0").exists():
            remedy = (
                f"there is an NVIDIA device, which PyTorch {torch.__version__} does not use: install its CUDA build"
            )
        else:
            remedy = "models beyond about 1 B parameters want a GPU: give --address of a cluster that has some"
        return [Finding("devices", "no CUDA device: everything runs on the CPU", "slow", remedy)]
    findings = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        findings.append(Finding(f"cuda:{index}", f"{name}, {free / GIB:.1f} GiB free of {total / GIB:.1f} GiB"))
    return findings


def _processor() -> list[Finding]:
    cores, quota = machine.cores(), machine.cpu_quota()
    limit = f", limited to {quota:g} by the container" if quota and quota < cores else ""
    return [Finding("CPU", f"{cores} cores{limit}")]


def _arithmetic() -> list[Finding]:
    """Of each kind of device: whether there are units for bf16, how fast it is, and what Espalier does about it."""
    import torch

    kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return [_arithmetic_on(torch.device(kind)) for kind in kinds]


def _arithmetic_on(device: "torch.device") -> Finding:
    import torch

    from espalier.stages.devices import has_units

    bf16, fp32 = (machine.gflops(dtype, device) for dtype in (torch.bfloat16, torch.float32))
    ratio = f"{bf16 / fp32:.1f} times faster" if bf16 > fp32 else f"{fp32 / bf16:.1f} times slower"
    units = has_units(torch.bfloat16, device)
    value = (
        f"{'units' if units else 'no units'} for bf16 products: {bf16:.3g} GFLOP/s, in fp32 {fp32:.3g} (measured): "
        f"bf16 is {ratio}; --compute auto computes bf16 checkpoints in {'bf16' if units else 'fp32'}"
    )
    name = f"arithmetic on the {'CPU' if device.type == 'cpu' else 'GPU'}"
    if not units:
        return Finding(name, value, "slow", "expect fp32 times; --compute bf16 is there to compare with")
    if bf16 < fp32:
        return Finding(name, value, "slow", "--compute fp32 is faster here, though there are units for bf16")
    return Finding(name, value)


def _memory() -> list[Finding]:
    available, total, limit = machine.memory_available()
    value = f"{available / GIB:.1f} GiB available of {total / GIB:.1f} GiB{' (container limit)' if limit else ''}"
    little = available < LITTLE_MEMORY
    findings = [
        Finding(
            "memory",
            value,
            "slow" if little else "ok",
            "little for more than a small model: end other programs, or keep one block at a time (--resident one)"
            if little
            else None,
        )
    ]
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        needed = min(RAY_STORE_SHARE * available, RAY_STORE_MOST)
        remedy = f"Ray keeps objects on disk instead: give the container --shm-size={needed / 1e9:.0f}gb"
        small = free < needed
        value = f"{free / GIB:.1f} GiB free"
        findings.append(Finding("/dev/shm", value, "slow" if small else "ok", remedy if small else None))
    return findings


def _disk() -> list[Finding]:
    findings = []
    for name, folder in (("disk here", Path.cwd()), ("disk for scratch", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        value = f"{free / GIB:.1f} GiB free at {folder}"
        if not os.access(folder, os.W_OK):
            remedy = (
                "run from a folder that you may write to" if folder == Path.cwd() else "set TMPDIR to another folder"
            )
            findings.append(Finding(name, f"{folder} is not writable", "missing", remedy, True))
        elif free < LITTLE_DISK:
            findings.append(Finding(name, value, "missing", "free some space: a run writes a whole checkpoint", True))
        else:
            findings.append(Finding(name, value, required=True))
    return findings


def _ray() -> list[Finding]:
    """Whether a token for clusters is set up, and is its owner's alone; the version is among the packages."""
    name = "Ray token"
    generate = "only needed for a cluster: `ray get-auth-token --generate`, the same token on every node"
    try:
        credentials = find_credentials()
    except Refusal as refusal:
        return [Finding(name, str(refusal), "missing", generate)]
    if credentials.token is None:
        return [Finding(name, f"none ({credentials.source})", "missing", generate)]
    if credentials.source == TOKEN:
        return [Finding(name, f"in {TOKEN}")]
    path = Path(os.environ.get(TOKEN_PATH) or DEFAULT_TOKEN_PATH.expanduser())
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        return [Finding(name, f"{path}, mode {mode:04o}: others can read it", "missing", f"chmod 600 {path}")]
    return [Finding(name, f"{path}, mode {mode:04o}")]


def _compiler() -> list[Finding]:
    """What torch.compile builds its kernels with; no command compiles anything."""
    name, program = "C++ compiler", os.environ.get("CXX", "c++")
    remedy = "only needed to train the demo's model anew: apt-get install g++, or your system's package of that name"
    path = shutil.which(program)
    if path is None:
        return [Finding(name, f"no {program} on PATH", "missing", remedy)]
    run = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=5, check=False)
    version = (run.stdout or run.stderr).partition("\n")[0]
    if run.returncode:
        return [Finding(name, f"{path} does not run: {version}", "missing", remedy)]
    return [Finding(name, f"{path}: {version}")]


def _tracking() -> list[Finding]:
    """Whether the MLflow tracking URI answers; without it a run keeps its own copy and goes on."""
    uri, name = default_tracking_uri(), "MLflow tracking"
    database = sqlite_path(uri)
    if database is not None:
        return [_tracking_database(name, database)]
    parts = urlsplit(uri)
    shown = without_credentials(uri)
    if parts.scheme not in ("http", "https"):
        if parts.scheme in ("", "file"):
            return [Finding(name, f"{shown}: MLflow 3 refuses the file store", "missing", "use sqlite:///mlflow.db")]
        return [Finding(name, f"{shown} (not asked: only http, https and sqlite are)")]
    remedy = "start the server or correct MLFLOW_TRACKING_URI; until then a run logs to a local copy"
    try:
        with urllib.request.urlopen(f"{shown.partition('?')[0].rstrip('/')}/health", timeout=2) as answer:
            return [Finding(name, f"{shown} answers ({answer.status})")]
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return [Finding(name, f"{shown} answers, and asks for credentials ({error.code})")]
        return [Finding(name, f"{shown} answers {error.code} to /health", "missing", remedy)]
    except (OSError, ValueError) as error:
        return [Finding(name, f"{shown} does not answer ({without_secrets(str(error))})", "missing", remedy)]


def _tracking_database(name: str, database: Path) -> Finding:
    if not database.exists():
        if os.access(database.parent, os.W_OK):
            return Finding(name, f"{database} (made by the first run)")
        return Finding(name, f"{database}: cannot be made", "missing", "set MLFLOW_TRACKING_URI to another place")
    connection = sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=1)
    try:
        (runs,) = connection.execute("select count(*) from runs").fetchone()
        return Finding(name, f"{database}, {runs} run{'' if runs == 1 else 's'}")
    except sqlite3.Error as error:
        remedy = "move the file away, or set MLFLOW_TRACKING_URI to another place"
        return Finding(name, f"{database} cannot be read as MLflow's: {error}", "missing", remedy)
    finally:
        connection.close()


def _hub() -> list[Finding]:
    off = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    state = "off (HF_HUB_OFFLINE): local models and texts only" if off else "on (not asked)"
    return [Finding("Hugging Face hub", state)]


CHECKS: dict[str, Callable[[], list[Finding]]] = {
    "packages": _packages,
    "devices": _devices,
    "processor": _processor,
    "arithmetic": _arithmetic,
    "memory": _memory,
    "disk": _disk,
    "ray": _ray,
    "compiler": _compiler,
    "tracking": _tracking,
    "hub": _hub,
}
