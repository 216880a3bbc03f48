"""Which files a criterion of the user's own takes along."""

import json
from pathlib import Path

import pytest

from espalier.pipeline.run.own_modules import criteria_in, own_files


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "flat_scores.py").touch()
    (tmp_path / "scores").mkdir()
    for name in ("__init__.py", "mine.py", "other.py"):
        (tmp_path / "scores" / name).touch()
    return tmp_path


def test_only_the_named_modules_and_their_packages_go_along(here: Path) -> None:
    assert own_files(["wanda", "flat_scores.spread"]) == {"flat_scores.py": here / "flat_scores.py"}
    names = ["scores/__init__.py", "scores/mine.py"]
    for name in ("scores.mine.spread", "scores.mine:spread"):
        assert own_files([name]) == {name: here / name for name in names}


def test_what_is_installed_or_cannot_be_found_stays(here: Path) -> None:
    assert own_files(["torch.nn.functional.relu", "json.dumps", "math.sin", "nowhere.at.all", "wanda"]) == {}


def test_a_command_line_names_criteria_in_flags_files_and_the_run_that_it_resumes(here: Path) -> None:
    (here / "recipe.yaml").write_text("criterion: a.b\noverrides:\n  - match: '*'\n    criterion: c.d\n")
    home = here / "out" / "espalier"
    home.mkdir(parents=True)
    (home / "run.json").write_text(json.dumps({"status": "x", "fingerprint": "", "config": {"criterion": "e.f"}}))
    assert list(criteria_in(["prune", "m", "--criterion", "a.b"])) == ["a.b"]
    assert list(criteria_in(["prune", "m", "--criterion=a:b", "--config", "recipe.yaml"])) == ["a:b", "a.b", "c.d"]
    assert list(criteria_in(["resume", "--shards", "2", "out"])) == ["e.f"]
