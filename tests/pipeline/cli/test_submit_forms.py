"""`espalier submit` as it is written: a command that becomes a job, in each of its forms, or a word about a job."""

import json
from typing import Any

import pytest

from espalier.cluster.connection import jobs
from espalier.cluster.connection.jobs import JobNeeds, JobOutcome, JobState
from espalier.pipeline.cli.main import main
from espalier.pipeline.commands import submit

PRUNE = ["prune", "model", "--output", "out", "--json"]
STATE = JobState("ray_1", "FAILED", "espalier prune model", "2026-01-01T00:00:00+00:00", 61.0, 2, "it ended")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was asked of a cluster that answers everything."""
    calls: list[Any] = []

    def submitted(args: list[str], **options: Any) -> int:
        calls.append((args, options["address"], options["follow"], options["needs"]))
        return 7

    def asked(name: str, answer: Any) -> Any:
        def ask(*given: Any, **options: Any) -> Any:
            calls.append((name, *given, *[options[key] for key in ("follow",) if key in options]))
            return answer

        return ask

    monkeypatch.setattr(submit, "submit_command", submitted)
    for name, answer in (("state", STATE), ("states", [STATE]), ("stop", STATE)):
        monkeypatch.setattr(jobs, name, asked(name, answer))
    monkeypatch.setattr(jobs, "logs", asked("logs", JobOutcome("ray_1", "FAILED", 3)))
    return calls


@pytest.mark.parametrize(
    "line",
    [
        ["--address", "head:1", "--", *PRUNE],
        ["--address", "head:1", *PRUNE],
        ["prune", "model", "--address", "head:1", "--output", "out", "--json"],
        [*PRUNE, "--address=head:1"],
    ],
)
def test_a_command_becomes_a_job_wherever_the_options_of_submit_stand(called: list[Any], line: list[str]) -> None:
    assert main(["submit", *line]) == 7
    assert called == [(PRUNE, "head:1", True, JobNeeds())]


def test_what_follows_two_dashes_is_the_commands_own(called: list[Any]) -> None:
    assert main(["submit", "--", *PRUNE, "--address", "auto", "--help"]) == 7
    assert called == [([*PRUNE, "--address", "auto", "--help"], None, True, JobNeeds())]


@pytest.mark.parametrize("flag", ["--detach", "--no-follow"])
def test_a_job_can_be_left_and_given_what_it_needs(called: list[Any], flag: str) -> None:
    assert main(["submit", flag, "--entrypoint-cpus", "2", "--entrypoint-memory", "1GiB", "--", *PRUNE]) == 7
    assert called == [(PRUNE, None, False, JobNeeds(cpus=2.0, memory=1 << 30))]


@pytest.mark.parametrize(
    ("line", "asked", "code"),
    [
        (["status", "ray_1", "--address", "head:1"], ("state", "ray_1", "head:1"), 0),
        (["--address", "head:1", "status", "ray_1"], ("state", "ray_1", "head:1"), 0),
        (["status"], ("states", None), 0),
        (["logs", "ray_1"], ("logs", "ray_1", None, False), 3),
        (["logs", "-f", "ray_1", "--address", "head:1"], ("logs", "ray_1", "head:1", True), 3),
        (["stop", "ray_1"], ("stop", "ray_1", None), 0),
    ],
)
def test_a_word_about_a_job_is_no_command(
    called: list[Any], line: list[str], asked: tuple[Any, ...], code: int
) -> None:
    assert main(["submit", *line]) == code
    assert called == [asked]


def test_how_a_job_is_doing_is_shown_in_three_lines_or_one_object(
    called: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", "status", "ray_1"]) == 0
    shown = capsys.readouterr().out
    assert "ray_1  FAILED, exit code 2" in shown and "espalier prune model" in shown and "it ended" in shown
    assert main(["submit", "status", "ray_1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exit_code"] == 2
    assert main(["submit", "status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["jobs"][0]["id"] == "ray_1"


def test_options_of_a_new_job_do_not_go_with_a_word_about_one(
    called: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", "--detach", "stop", "ray_1"]) == 2 and not called
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("word", ["status", "logs", "stop"])
def test_help_of_each_word_shows_an_example_and_fits_80_columns(
    word: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["submit", word, "-h"]) == 0
    out = capsys.readouterr().out
    assert f"Example: espalier submit {word}" in out and "…" not in out and max(map(len, out.splitlines())) <= 80


def test_ctrl_c_while_a_job_is_followed_is_one_line_that_says_how_to_look_at_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pressed(*_: Any, **__: Any) -> None:
        stop = KeyboardInterrupt()
        stop.add_note("job ray_1 goes on; `espalier submit logs -f ray_1` follows it")
        raise stop

    monkeypatch.setattr(submit, "submit_command", pressed)
    assert main(["submit", "--", *PRUNE]) == 130
    said = "espalier: interrupted; job ray_1 goes on; `espalier submit logs -f ray_1` follows it\n"
    assert capsys.readouterr().err == said
