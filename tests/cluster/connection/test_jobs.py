"""Jobs on a real cluster: their output, their exit codes, what goes along, what becomes of them, and the refusals."""

import re
import signal
import socket

import pytest
from timed import within

from espalier.cluster.connection import code_package as package
from espalier.cluster.connection.jobs import SHIPPED, JobNeeds, logs, state, states, stop, submit
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


def test_a_job_that_nobody_waits_for_is_handed_back_at_once_with_how_to_look_at_it(member) -> None:
    lines: list[str] = []
    outcome = submit(["true"], address=member.dashboard_url, env={}, on_line=lines.append, follow=False)
    assert outcome.job_id and outcome.exit_code is None
    assert f"espalier submit logs -f {outcome.job_id} --address {member.dashboard_url}" in lines[1]


def test_ctrl_c_leaves_the_job_to_itself_which_can_be_looked_at_followed_and_stopped(member) -> None:
    lines: list[str] = []

    def press(line: str) -> None:
        lines.append(line)
        if line == "waiting":
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as pressed:
        submit(["python", "-c", WAITS, "a b"], address=member.dashboard_url, env={}, on_line=press)
    job_id = lines[0].split()[1]
    (note,) = pressed.value.__notes__
    where = f"{job_id} --address {member.dashboard_url}"
    assert note.startswith(f"job {job_id} goes on; ") and f"`espalier submit logs -f {where}`" in note
    assert f"`espalier submit stop {where}`" in note

    running = state(job_id, member.address)
    assert (running.status, running.exit_code) == ("RUNNING", None) and running.command.endswith("'a b'")
    assert job_id in [job.id for job in states(member.dashboard_url)]
    so_far: list[str] = []
    assert logs(job_id, member.dashboard_url, follow=False, on_line=so_far.append).exit_code is None
    assert so_far[-1] == "waiting"

    assert stop(job_id, member.dashboard_url).status == "STOPPED"
    all_of_it: list[str] = []
    assert logs(job_id, member.dashboard_url, follow=True, on_line=all_of_it.append).exit_code == 130
    assert {"waiting", "resume with: espalier resume DIR"} <= set(all_of_it)
    assert stop(job_id, member.dashboard_url).status == "STOPPED", "told again, it has ended already"


def test_a_job_that_there_is_not_is_one_line_with_what_lists_those_there_are(member) -> None:
    for ask in (state, stop, lambda *job: logs(*job, follow=True, on_line=print)):
        with within(10), pytest.raises(Refusal, match=r"^job raysubmit_none: .* none .* submit status --address http"):
            ask("raysubmit_none", member.dashboard_url)


def test_a_folder_and_variables_go_along_and_no_secret_comes_out(member, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "mine with space"
    (folder / "espalier").mkdir(parents=True)  # of the same name as ours: it stays apart
    (folder / "text.txt").write_text("sent along")
    (folder / ".env").write_text("what is hidden stays")
    monkeypatch.setenv("SOME_TOKEN", "planted-secret")
    code = (
        "import os, sys, espalier.stages.errors; print(open(sys.argv[1][7:]).read(), sorted(os.listdir()), "
        "os.environ['GIVEN'], 'planted-' + 'secret')"
    )
    lines: list[str] = []
    outcome = submit(
        ["python", "-c", code, f"--text={SHIPPED}/text.txt"],
        address=member.dashboard_url,
        env={"GIVEN": "by us"},
        on_line=lines.append,
        needs=JobNeeds(working_dir=folder, runtime_env={"env_vars": {"GIVEN": "by the user"}}),
    )
    assert outcome.exit_code == 0, lines
    assert "sent along ['espalier', 'text.txt'] by the user ***" in lines
    assert state(outcome.job_id, member.address).command.endswith("--text=WORKING_DIR/text.txt")


def test_a_job_that_waits_for_room_is_said_to_and_to_end_when_it_begins(member, monkeypatch) -> None:
    monkeypatch.setattr("espalier.cluster.connection.jobs.UNSTARTED_SECONDS", 1)
    monkeypatch.setattr("espalier.cluster.connection.job_output.WAITING_SECONDS", 0)
    lines: list[str] = []

    def press(line: str) -> None:
        lines.append(line)
        if "has not started" in line:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        submit(["true"], address=member.dashboard_url, env={}, on_line=press, needs=JobNeeds(memory=1 << 60))
    assert "waiting for resources" in lines[-1]
    job_id = lines[0].split()[1]
    try:
        ended = stop(job_id, member.dashboard_url)
    except Refusal as refusal:  # Ray has a process to stop only when the job has begun
        assert re.match(rf"^job {job_id} still waits for room.* will end as soon as it has begun$", str(refusal))
    else:
        assert ended.status in ("STOPPED", "FAILED") and ended.exit_code is None


def test_a_runtime_environment_that_ray_refuses_and_a_folder_that_is_too_large(member, tmp_path, monkeypatch) -> None:
    with pytest.raises(Refusal, match=r"^--runtime-env: .*pip"):
        submit(["true"], address=member.dashboard_url, env={}, on_line=print, needs=JobNeeds(runtime_env={"pip": 3}))
    (tmp_path / "model.bin").write_bytes(b"0" * 100)
    monkeypatch.setattr(package, "MOST_SHIPPED", 50)
    for folder, said in ((tmp_path, "MiB"), (tmp_path / "none", "no such folder")):
        with pytest.raises(Refusal, match=rf"^--working-dir {folder}: .*{said}"):
            submit(["true"], address=member.dashboard_url, env={}, on_line=print, needs=JobNeeds(working_dir=folder))


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
