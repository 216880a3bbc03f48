"""The command line as a person meets it: help with examples, exit codes, one line for what goes wrong."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.main import get_command

from espalier.pipeline.cli import main as cli
from espalier.pipeline.cli.main import app, main
from espalier.pipeline.config.prune import PruneConfig

COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"Example: espalier {command}" in capsys.readouterr().out


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)
    assert {"prune", "resume", "eval", "compare", "plan", "submit", "demo", "doctor"} <= set(COMMANDS)


def test_help_of_prune_has_a_flag_for_each_field(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["prune", "--help"]) == 0
    out = capsys.readouterr().out
    assert [
        name
        for name in set(PruneConfig.model_fields) - {"model", "overrides"}
        if f"--{name.removesuffix('_options').replace('_', '-')}" not in out
    ] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_terminal_of_80_columns(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert {word for word in out.split() if "…" in word} <= {"--no-shadow-sign…"}, "no flag is cut"
    assert not [line for line in out.splitlines() if line.removeprefix("│").lstrip().startswith("|")], (
        "no list of values"
    )


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prone"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("espalier: ") and "prone" in err and err.count("\n") == 1 and not out


def test_a_bug_is_one_line_and_exit_code_one_and_a_traceback_on_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("by [0]")

    monkeypatch.setattr("espalier.pipeline.pruning.prune.resume", broken)
    assert main(["resume", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "espalier: unexpected ZeroDivisionError: by [0]; run again with --debug\n"
    with pytest.raises(ZeroDivisionError):
        main(["resume", str(tmp_path), "--debug"])


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"], []])
def test_help_and_version_come_without_importing_torch_ray_or_transformers(arguments: list[str]) -> None:
    code = (
        "import sys; from espalier.pipeline.cli.main import main; main(sys.argv[1:]); "
        "heavy = {'torch', 'ray', 'transformers', 'mlflow', 'numpy', 'pydantic'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=os.environ)
    assert done.stdout.splitlines()[-1] == "[]" and "espalier" in (done.stdout + done.stderr)


@pytest.mark.parametrize("command", COMMANDS)
def test_h_is_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    long = capsys.readouterr().out
    assert main([command, "-h"]) == 0
    assert capsys.readouterr().out == long


def test_version_names_what_a_report_of_a_fault_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.startswith(f"espalier {version('espalier-llm')} ")
    for name in ("torch", "transformers", "ray", "deepspeed", "mlflow"):
        assert f"{name} {version(name)}" in out


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("espalier pr", {"prune"}),
        ("espalier prune --resid", {"--resident"}),
        ("espalier prune --resident ", {"all", "one", "auto"}),
        ("espalier retrain --schedule co", {"cosine", "constant"}),
    ],
)
def test_a_shell_completes_commands_flags_and_words(line: str, offered: set[str]) -> None:
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1), "_ESPALIER_COMPLETE": "complete_bash"}
    command = [sys.executable, "-m", "espalier"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | words)
    assert set(done.stdout.split()) == offered, done.stderr


def test_completion_can_be_shown_for_a_shell() -> None:
    command = [sys.executable, "-m", "espalier", "--show-completion", "bash"]
    environment = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "_ESPALIER_COMPLETE=complete_bash" in done.stdout


def test_json_goes_to_stdout_alone(capsys: pytest.CaptureFixture[str]) -> None:
    cli.show({"a": 1.5}, True, lambda: "a table")
    out, err = capsys.readouterr()
    assert json.loads(out) == {"a": 1.5} and out.count("\n") == 1 and not err
