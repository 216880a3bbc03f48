"""`espalier doctor`: says what is missing and what to install, hides secrets, and finds nothing required missing."""

import dataclasses
import importlib.metadata
import io
import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from rich.console import Console

from espalier.pipeline.commands.doctor import Finding, examine, exit_code, render
from espalier.pipeline.planning import hardware as machine


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch, tmp_path):
    """No token, server or compiler choice of the machine that runs the tests."""
    for name in (
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
        "MLFLOW_TRACKING_URI",
        "CXX",
        "HF_HUB_OFFLINE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def one(findings: list[Finding], name: str) -> Finding:
    (finding,) = [finding for finding in findings if finding.name == name]
    return finding


def test_nothing_required_is_missing_where_the_tests_run():
    findings = examine()
    assert [finding for finding in findings if finding.required and finding.state == "missing"] == []
    assert exit_code(findings) == 0
    assert not [finding for finding in findings if "could not be examined" in finding.value]
    assert one(findings, "torch").value == torch.__version__
    assert json.loads(json.dumps([dataclasses.asdict(finding) for finding in findings]))[0]["name"] == "espalier-llm"
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render(findings))
    shown = console.export_text()
    assert all(finding.name in shown for finding in findings)


def test_missing_compiler_is_reported_with_the_package_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "")
    findings = examine("compiler")
    assert one(findings, "C++ compiler").state == "missing"
    assert "g++" in (one(findings, "C++ compiler").remedy or "")
    assert exit_code(findings) == 0, "no command needs a compiler"


def test_compiler_that_does_not_run_is_missing(monkeypatch, tmp_path):
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho no backend >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    finding = one(examine("compiler"), "C++ compiler")
    assert finding.state == "missing"
    assert "no backend" in finding.value


def test_package_outside_its_range_or_absent_is_required_and_missing(monkeypatch):
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "ray":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0" if name == "torch" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    findings = examine("packages")
    assert one(findings, "torch").value.startswith("1.0, not >=")
    assert (one(findings, "torch").remedy or "").startswith('pip install "torch>=')
    assert one(findings, "ray").value == "not installed"
    assert not [finding for finding in findings if finding.name == "pytest"], "extras are not required"
    assert exit_code(findings) == 1


def test_one_broken_check_does_not_hide_the_others(monkeypatch):
    def broken() -> tuple[int, int, bool]:
        raise RuntimeError("no /proc")

    monkeypatch.setattr(machine, "memory_available", broken)
    monkeypatch.setattr(machine, "SECONDS_TO_MEASURE", 0.0)
    findings = examine()
    assert one(findings, "memory").value == "could not be examined: RuntimeError: no /proc"
    assert one(findings, "disk here").state == "ok"


def test_token_is_reported_by_place_and_mode_and_never_by_value(monkeypatch, tmp_path):
    assert one(examine("ray"), "Ray token").state == "missing"
    path = tmp_path / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("s3cret")
    path.chmod(0o600)
    kept = one(examine("ray"), "Ray token")
    assert (kept.state, kept.value) == ("ok", f"{path}, mode 0600")
    path.chmod(0o644)
    open_to_all = one(examine("ray"), "Ray token")
    assert (open_to_all.state, open_to_all.remedy) == ("missing", f"chmod 600 {path}")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "s3cret")
    given = one(examine("ray"), "Ray token")
    assert given.state == "ok"
    assert not any("s3cret" in repr(finding) for finding in (kept, open_to_all, given))
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "nope"))
    assert one(examine("ray"), "Ray token").state == "missing"


class _Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response({"/health": 200, "/broken/health": 500, "/closed/health": 401}.get(self.path, 404))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_tracking_server_is_asked_and_its_password_is_not_shown(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        states = {}
        for path in ("", "/broken", "/closed"):
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:pa55word@127.0.0.1:{server.server_port}{path}")
            (finding,) = examine("tracking")
            assert "pa55word" not in repr(finding)
            states[path] = finding.state
        assert states == {"": "ok", "/broken": "missing", "/closed": "ok"}
    finally:
        server.shutdown()
        server.server_close()


def test_tracking_server_that_is_down_is_missing_but_not_required(monkeypatch):
    with socket.socket() as held:  # bound and not listening: connections are refused
        held.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{held.getsockname()[1]}")
        (finding,) = examine("tracking")
    assert finding.state == "missing"
    assert "local copy" in (finding.remedy or "")
    assert exit_code([finding]) == 0


def test_tracking_database_is_opened_read_only(tmp_path):
    assert examine("tracking")[0].state == "ok"
    assert not (tmp_path / "mlflow.db").exists()
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        connection.execute("create table runs (run_uuid text)")
        connection.execute("insert into runs values ('a')")
    connection.close()
    assert examine("tracking")[0].value.endswith("mlflow.db, 1 run")
    (tmp_path / "mlflow.db").write_bytes(b"not a database at all, but long enough to be taken for one" * 20)
    assert examine("tracking")[0].state == "missing"


def test_file_store_is_reported_as_refused(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    assert "sqlite:///" in (examine("tracking")[0].remedy or "")


@pytest.mark.parametrize(
    ("rates", "units", "state", "said"),
    [
        ((640.0, 160.0), True, "ok", "bf16 is 4.0 times faster; --compute auto computes bf16 checkpoints in bf16"),
        ((0.8, 96.0), False, "slow", "bf16 is 120.0 times slower; --compute auto computes bf16 checkpoints in fp32"),
        ((80.0, 160.0), True, "slow", "bf16 is 2.0 times slower; --compute auto computes bf16 checkpoints in bf16"),
    ],
)
def test_how_fast_bf16_is_and_what_is_done_about_it(rates, units, state, said, monkeypatch):
    remaining = iter(rates)
    monkeypatch.setattr(machine, "gflops", lambda dtype, device: next(remaining))
    monkeypatch.setattr("espalier.stages.devices.has_units", lambda dtype, device: units)
    (finding,) = examine("arithmetic")
    assert finding.state == state and said in finding.value
    assert ("--compute fp32" in (finding.remedy or "")) == (units and state == "slow")
    assert finding.value.startswith("units" if units else "no units")


def test_units_that_onednn_may_not_use_are_none():
    program = (
        "from espalier.pipeline.commands import doctor\n"
        "from espalier.pipeline.planning import hardware\n"
        "hardware.SECONDS_TO_MEASURE = 0.01\n"
        "print(doctor.examine('arithmetic')[0].value)"
    )
    limited = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", program], env=limited, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("no units for bf16") and "computes bf16 checkpoints in fp32" in done.stdout


def test_measured_speed_is_plausible(monkeypatch):
    monkeypatch.setattr(machine, "SECONDS_TO_MEASURE", 0.05)
    assert 0.1 < machine.gflops(torch.float32, torch.device("cpu")) < 1e6


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_container_limit_is_what_counts_as_memory(version, tmp_path, monkeypatch):
    gib = 1 << 30
    names = {
        "v1": ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
        "v2": ("memory.max", "memory.current", "memory.stat"),
    }[version]
    contents = (f"{gib}\n", f"{gib // 2}\n", f"anon 1\ninactive_file {gib // 4}\n")
    for name, content in zip(names, contents, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert machine.memory_available() == (3 * gib // 4, gib, True)
    memory = one(examine("memory"), "memory")
    assert (memory.state, memory.value) == ("slow", "0.8 GiB available of 1.0 GiB (container limit)")


def test_no_container_limit_leaves_the_machines_memory(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert machine.memory_available()[2] is False
    assert machine.cpu_quota() is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert machine.cpu_quota() == 1.5


def test_small_shared_memory_and_full_disk_are_reported(monkeypatch):
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 26, 0, 1 << 26))
    if Path("/dev/shm").is_dir():
        shared = one(examine("memory"), "/dev/shm")
        assert shared.state == "slow"
        assert "--shm-size" in (shared.remedy or "")
    findings = examine("disk")
    assert one(findings, "disk here").state == "missing"
    assert exit_code(findings) == 1


def test_each_cuda_device_is_named_with_its_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (70 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    first, second = examine("devices")
    assert (first.name, second.name) == ("cuda:0", "cuda:1")
    assert first.value == "Some GPU, 70.0 GiB free of 80.0 GiB"


def test_hub_is_off_when_the_environment_says_so(monkeypatch):
    assert "on" in examine("hub")[0].value
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert examine("hub")[0].value.startswith("off")
