"""What `espalier submit` makes of its arguments and environment before it makes a job of them."""

from pathlib import Path

import pytest

from espalier.cluster.connection.jobs import JobNeeds, JobOutcome
from espalier.pipeline.commands import submit
from espalier.pipeline.commands.submit import absolute, job_environment, job_needs, shipped
from espalier.stages.errors import Refusal


@pytest.fixture
def here(tmp_path, monkeypatch):
    for name in ("wanda", "prune", "model", "text.txt", "sub/model"):
        (tmp_path / name).mkdir(parents=True) if "." not in name else (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_paths_become_absolute_and_nothing_else_does(here) -> None:
    given = [
        "prune",
        "model",
        "--output",
        "out",
        "--calibration=text.txt",
        "--eval",
        "allenai/c4",
        "--criterion",
        "wanda",
    ]
    assert absolute(given) == [
        *("prune", f"{here}/model", "--output", f"{here}/out", f"--calibration={here}/text.txt"),
        *("--eval", "allenai/c4", "--criterion", "wanda"),
    ]


def test_an_argument_after_a_flag_is_no_value_of_it(here) -> None:
    assert absolute(["eval", "--json", "model", "--sparsity", "0.5"])[2] == f"{here}/model"


def test_a_path_with_a_slash_is_one_after_any_option(here) -> None:
    assert absolute(["prune", "--unheard-of", "sub/model"])[2] == f"{here}/sub/model"


def test_mlflow_goes_where_a_local_run_would_log_and_secrets_stay(here, monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    passed = job_environment()
    assert passed["MLFLOW_TRACKING_URI"] == f"sqlite:///{here}/mlflow.db"
    assert passed["HF_HUB_OFFLINE"] == "1" and "HF_TOKEN" not in passed
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert job_environment()["MLFLOW_TRACKING_URI"] == "http://tracker:5000"


@pytest.mark.parametrize(("given", "expected"), [(0, 0), (3, 3), (None, 0)])
def test_the_exit_code_is_the_job_s(monkeypatch, given, expected) -> None:
    def instead(entrypoint, **_):
        assert entrypoint[:3] == ["python", "-m", "espalier"]
        return JobOutcome("id", "whatever", given)

    monkeypatch.setattr(submit, "submit", instead)
    assert submit.submit_command(["doctor"], address=None) == expected


def test_uris_with_credentials_stay_here_and_their_owner_is_told(here, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://ann:planted@db/mlflow")
    monkeypatch.setenv("HF_ENDPOINT", "https://ann:planted@mirror")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "planted")
    monkeypatch.setenv("HF_TOKEN_PATH", "/secrets/token")
    passed = job_environment()
    assert "MLFLOW_TRACKING_URI" not in passed and "planted" not in str(passed)
    assert passed["HF_TOKEN_PATH"] == "/secrets/token"
    monkeypatch.setattr(submit, "submit", lambda entrypoint, **_: JobOutcome("id", "whatever", 0))
    lines: list[str] = []
    submit.submit_command(["doctor"], address=None, on_line=lines.append)
    assert len(lines) == 1 and "postgresql://db/mlflow" in lines[0] and "planted" not in lines[0]


def test_an_argument_with_credentials_is_refused(here) -> None:
    with pytest.raises(Refusal, match=r"submit: --eval=https://host/x\?token=\*\*\* holds .*--config") as caught:
        submit.submit_command(["eval", "model", "--eval=https://ann:planted@host/x?token=planted"], address=None)
    assert "planted" not in str(caught.value)


def test_what_goes_along_is_named_within_its_copy_but_for_what_is_written(here) -> None:
    given = ["prune", f"{here}/model", "--output", f"{here}/sub", f"--calibration={here}/text.txt", "--eval", "/data/x"]
    assert shipped(given, here) == [
        *("prune", "\0/model", "--output", f"{here}/sub", "--calibration=\0/text.txt", "--eval", "/data/x")
    ]
    assert shipped(["eval", str(here), "--data", f"{here}/none.txt"], here) == [
        "eval",
        "\0",
        "--data",
        f"{here}/none.txt",
    ]


def test_what_a_job_needs_is_read_from_sizes_and_a_file(here) -> None:
    Path("env.yaml").write_text("pip: [einops]\nenv_vars: {HF_HOME: /data/hub}\n")
    needs = job_needs(Path("sub"), Path("env.yaml"), 2, None, "8GB")
    assert needs == JobNeeds(Path("sub"), {"pip": ["einops"], "env_vars": {"HF_HOME": "/data/hub"}}, 2, None, 8 * 10**9)
    assert job_needs(None, None, None, None, None) == JobNeeds()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pipp: [einops]", r"pipp is unknown; did you mean pip\?"),
        ("working_dir: .", "--working-dir says which folder"),
        ("env_vars: {HF_TOKEN: planted-token}", "env_vars HF_TOKEN holds a secret"),
        ("pip: ['--index-url https://ann:planted-token@host/simple']", "a URI in it holds a secret"),
        ("[a]", "must hold options"),
    ],
)
def test_a_runtime_environment_that_cannot_be_is_one_line(here, text: str, said: str) -> None:
    Path("env.yaml").write_text(text)
    with pytest.raises(Refusal, match=rf"env\.yaml: .*{said}") as caught:
        job_needs(None, Path("env.yaml"), None, None, None)
    assert "planted" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("cpus", "memory", "said"), [(-1, None, "cpus -1: "), (None, "much", "memory much: no size")])
def test_amounts_that_cannot_be_are_one_line(cpus: float | None, memory: str | None, said: str) -> None:
    with pytest.raises(Refusal, match=f"^--entrypoint-{said}"):
        job_needs(None, None, cpus, None, memory)
