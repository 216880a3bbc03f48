"""The command line as a person meets it: help with examples, exit codes, one line for what goes wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from pipeline import cli
from pipeline.cli import app, main
from pipeline.config import PruneConfig

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


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prone"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("espalier: ") and "prone" in err and err.count("\n") == 1 and not out


def test_a_bug_is_one_line_and_exit_code_one_and_a_traceback_on_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("by [0]")

    monkeypatch.setattr("pipeline.driver.resume", broken)
    assert main(["resume", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "espalier: unexpected ZeroDivisionError: by [0]; run again with --debug\n"
    with pytest.raises(ZeroDivisionError):
        main(["resume", str(tmp_path), "--debug"])


def test_ctrl_c_is_exit_code_130_and_says_how_to_go_on_if_there_is_a_way(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.driver.prune", interrupted)
    arguments = ["prune", "m", f"--output={tmp_path}", "--calibration", "c"]
    assert main(arguments) == 130
    assert capsys.readouterr().err == "espalier: interrupted\n"
    (tmp_path / "espalier").mkdir()
    (tmp_path / "espalier" / "run.json").write_text("{}")
    assert main(arguments) == 130
    assert capsys.readouterr().err == f"espalier: interrupted; `espalier resume {tmp_path}` goes on\n"


def test_help_comes_without_importing_torch_or_ray() -> None:
    code = "import sys; from pipeline.cli import main; main(['--help']); sys.exit(int('ray' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ)
    assert done.returncode == 0


def test_json_goes_to_stdout_alone(capsys: pytest.CaptureFixture[str]) -> None:
    cli.show({"a": 1.5}, True, lambda: "a table")
    out, err = capsys.readouterr()
    assert json.loads(out) == {"a": 1.5} and out.count("\n") == 1 and not err
