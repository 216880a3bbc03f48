"""Connections to Ray: what opens, what is refused, how fast, and what is left behind."""

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from timed import within

from espalier.cluster.connection import connect, folders
from espalier.cluster.connection.connect import existing_cluster
from espalier.cluster.connection.folders import own_folder
from espalier.cluster.connection.inventory import nodes
from espalier.stages.errors import Refusal

pytestmark = pytest.mark.ray
STORE = 100_000_000
AUTH = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")


def refusal(address: str) -> str:
    with within(10), pytest.raises(Refusal) as caught, existing_cluster(address):
        pass
    assert not ray.is_initialized()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_member_sees_both_raylets_and_their_sizes(member) -> None:
    with existing_cluster(member.address):
        found = nodes()
    assert len({node.node_id for node in found}) == 2
    assert [node.cpus for node in found] == [2, 2]
    assert all(node.object_store_bytes == 200_000_000 and node.memory_bytes > 0 for node in found)


def test_workers_of_an_existing_cluster_run_this_copy_of_the_project(member) -> None:
    with existing_cluster(member.address):
        ship = ray.remote(
            lambda: (
                __import__("espalier.stages.errors").__path__,
                __import__("espalier.cluster.connection.connect").__path__,
            )
        )
        for path in ray.get(ship.remote()):
            assert str(member.home) in next(iter(path))  # the upload, and not the clone or site-packages


def test_the_environment_is_as_before_after_a_connection(member) -> None:
    before = {name: os.environ.get(name) for name in AUTH}
    with existing_cluster(member.address):
        assert os.environ["RAY_AUTH_MODE"] == "token"
    assert {name: os.environ.get(name) for name in AUTH} == before


def test_a_wrong_token_is_refused_within_ten_seconds(stranger) -> None:
    message = refusal(stranger.address)
    assert "does not accept the token" in message and os.environ["RAY_AUTH_TOKEN_PATH"] in message


def test_no_token_is_refused_within_ten_seconds_and_says_how_to_make_one(stranger, monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "ray get-auth-token --generate" in refusal(stranger.address)


def test_a_token_that_the_mode_forbids_is_named_as_the_reason(member, monkeypatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "RAY_AUTH_MODE=disabled" in refusal(member.address)


def test_a_token_file_that_is_not_there_is_refused(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "nothing"))
    assert str(tmp_path / "nothing") in refusal("127.0.0.1:6379")


def test_nobody_listening_is_refused_within_ten_seconds() -> None:
    with socket.socket() as bound:  # bound and not listening: nobody else can take the port meanwhile
        bound.bind(("127.0.0.1", 0))
        assert "cannot be reached" in refusal(f"127.0.0.1:{bound.getsockname()[1]}")


def test_a_listener_that_is_no_ray_cluster_is_refused_after_the_time_for_a_probe(monkeypatch) -> None:
    monkeypatch.setattr(connect, "PROBE_SECONDS", 0.5)
    with socket.create_server(("", 0)) as silent:
        assert "not the control service" in refusal(f"127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.parametrize(
    "address", ["ray://127.0.0.1:10001", "http://127.0.0.1:8265", "head", "head:port", "head:65536", ""]
)
def test_an_address_of_another_kind_is_refused_with_the_kind_that_is_wanted(address) -> None:
    assert "host:port" in refusal(address)


def test_auto_without_any_cluster_is_refused(monkeypatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def none_running(address: str) -> str:
        raise ConnectionError("Could not find any running Ray instance.\nAnd more.")

    monkeypatch.setattr("ray._private.services.canonicalize_bootstrap_address", none_running)
    assert "no Ray cluster runs on this machine" in refusal("auto")


def test_a_cluster_without_a_node_on_this_machine_is_refused_and_not_waited_for(member, monkeypatch) -> None:
    monkeypatch.setattr("ray._private.services.find_node_ids", set)
    assert "espalier submit" in refusal(member.address)


def test_ray_address_counts_as_the_address(member, monkeypatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", member.address)
    with connect.connect(None, cpus=1, object_store_bytes=STORE):
        assert len(nodes()) == 2


def test_a_local_cluster_is_new_and_private_and_a_failed_run_leaves_nothing_of_it(member, monkeypatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", member.address)
    before = {name: os.environ.get(name) for name in AUTH}
    shape = {"cpus": 1, "object_store_bytes": STORE}
    with pytest.raises(RuntimeError, match="the run"), connect.connect("local", **shape):
        (only,) = nodes()
        assert (only.cpus, only.object_store_bytes) == (1, STORE)
        assert ray.get_runtime_context().gcs_address != member.address
        token_path = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        assert stat.S_IMODE(token_path.stat().st_mode) == 0o600
        assert token_path.read_text() != member.token_path.read_text()
        with connect.connect(None, **shape):  # a run inside a run shares the connection
            assert nodes() == [only]
        assert ray.is_initialized()
        with pytest.raises(Refusal, match="this process is connected"), connect.connect(member.address, **shape):
            pass
        raise RuntimeError("the run")
    assert not ray.is_initialized() and not token_path.parent.exists()
    assert {name: os.environ.get(name) for name in AUTH} == before


GARBAGE = """
import gc
import sys

import ray

from espalier.cluster.connection.connect import existing_cluster


class CollectsLate:
    def __init__(self, worker):
        self.worker = worker

    def __getattr__(self, name):
        return getattr(self.worker, name)

    def shutdown_driver(self):  # as if another thread collected garbage before ray.shutdown is done
        self.worker.shutdown_driver()
        print("shut down", gc.collect() >= 0)


with existing_cluster(sys.argv[1]):
    ray._private.worker.global_worker.core_worker = CollectsLate(ray._private.worker.global_worker.core_worker)
    gc.disable()  # nothing else frees it before
    cycle = [ray.put(1)]
    cycle.append(cycle)
    del cycle
print("alive")
"""


def test_garbage_with_references_in_it_does_not_end_the_process_while_ray_shuts_down(member) -> None:
    command = [sys.executable, "-c", GARBAGE, member.address]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, "shut down True\nalive\n"), ended.stderr


def test_the_files_of_a_killed_run_go_with_the_next_and_those_of_a_live_one_stay(tmp_path) -> None:
    killed, young, old = (tmp_path / f"{folders.PREFIX}{name}" for name in ("killed", "young", "old"))
    for folder in (killed, young, old):
        folder.mkdir()
    (killed / folders.LOCK).touch()
    os.utime(old, (0, 0))  # killed before it had a lock; `young` may be about to lock its folder
    with own_folder(tmp_path) as live, own_folder(tmp_path) as second:
        assert live.exists() and second.exists() and young.exists() and not killed.exists() and not old.exists()
    assert list(tmp_path.iterdir()) == [young]
