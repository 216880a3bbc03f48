"""Jobs on a real cluster: their output, their exit codes, their code, and the refusals before one is made."""

import signal
import socket

import pytest
from timed import within

from espalier.cluster.connection import code_package as package
from espalier.cluster.connection.jobs import _Lines, submit
from espalier.stages.errors import Refusal

pytestmark = pytest.mark.ray

SEES_THE_CLUSTER = """
import os, sys, ray, espalier.stages.errors
from espalier.cluster.connection.connect import connect
from espalier.cluster.connection.inventory import nodes
print("code from", os.path.dirname(espalier.stages.errors.__file__))
with connect(None, cpus=1, object_store_bytes=10**8):
    print("nodes", len(nodes()), "variable", os.environ["GIVEN"])
    seen = ray.remote(lambda: __import__("espalier.stages.errors").stages.errors.__file__)
    print("worker sees", ray.get(seen.remote()))
print("last line", end="")
sys.exit(3)
"""
WAITS = """
import signal, sys, time
print("waiting", flush=True)
try:
    time.sleep(600)
except KeyboardInterrupt:
    print("resume with: espalier resume DIR")
    sys.exit(1)
"""


def refusal(address: str) -> str:
    with within(10), pytest.raises(Refusal) as caught:
        submit(["true"], address=address, env={}, on_line=print)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_job_runs_this_code_on_both_raylets_and_its_lines_and_exit_code_come_back(member) -> None:
    lines: list[str] = []
    outcome = submit(
        ["python", "-c", SEES_THE_CLUSTER], address=member.dashboard_url, env={"GIVEN": "x y"}, on_line=lines.append
    )
    assert (outcome.status, outcome.exit_code) == ("FAILED", 3)
    assert "nodes 2 variable x y" in lines
    assert lines[-1] == "last line"  # whole, although it has no newline
    (code,) = [line for line in lines if line.startswith("code from")]
    (worker,) = [line for line in lines if line.startswith("worker sees")]
    assert str(member.home) in code and str(member.home) in worker and str(package.root()) not in code + worker
    assert not any(member.token_path.read_text() in line for line in lines)


def test_a_job_that_succeeds_gives_zero_through_the_address_of_the_cluster(member) -> None:
    lines: list[str] = []
    outcome = submit(
        ["sh", "-c", "echo 'it is' \"$1\"", "sh", "a  b"], address=member.address, env={}, on_line=lines.append
    )
    assert (outcome.status, outcome.exit_code) == ("SUCCEEDED", 0)
    assert "it is a  b" in lines


def test_a_job_that_nobody_waits_for_is_handed_back_at_once(member) -> None:
    outcome = submit(["true"], address=member.dashboard_url, env={}, on_line=print, follow=False)
    assert outcome.job_id and outcome.exit_code is None


def test_ctrl_c_stops_the_job_which_still_gets_to_say_how_to_resume(member) -> None:
    lines: list[str] = []

    def press(line: str) -> None:
        lines.append(line)
        if line == "waiting":
            signal.raise_signal(signal.SIGINT)

    outcome = submit(["python", "-c", WAITS], address=member.dashboard_url, env={}, on_line=press)
    assert (outcome.status, outcome.exit_code) == ("STOPPED", 130)
    assert "resume with: espalier resume DIR" in lines
    assert any(line.startswith("Ctrl-C: stopping job") for line in lines)
    assert lines.count("waiting") == 1  # the log is sent anew after Ctrl-C, and passed on once


def test_a_wrong_token_is_refused_within_ten_seconds(stranger) -> None:
    assert "does not accept the token" in refusal(stranger.dashboard_url)
    assert "does not accept the token" in refusal(stranger.address)


def test_no_token_is_refused_within_ten_seconds(stranger, monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "asks for a token" in refusal(stranger.dashboard_url)


def test_nobody_listening_is_refused_within_ten_seconds() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        assert "cannot be reached" in refusal(f"http://127.0.0.1:{bound.getsockname()[1]}")


def test_a_listener_that_is_no_dashboard_is_refused_within_ten_seconds(member) -> None:
    assert "does not answer" in refusal(f"http://{member.address}")  # the control service: speaks, but not HTTP/1


def test_lines_are_passed_on_once_however_the_log_is_cut_and_sent_again() -> None:
    seen: list[str] = []
    lines = _Lines(seen.append)
    for chunk in ("a\nb", "b\nc"):
        lines.feed(chunk)
    lines.restart()  # the connection broke: the log comes from its start, cut elsewhere
    for chunk in ("a\n", "bb\ncc\n", "d"):
        lines.feed(chunk)
    lines.finish("a\nbb\ncc\ndd")
    assert seen == ["a", "bb", "cc", "dd"]
