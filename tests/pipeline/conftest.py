"""What the tests of whole runs share: one MLflow database, models, texts, a request."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from whole_runs import LENGTH, MICROBATCH, SAMPLES, add_tokenizer, write_text

from espalier.pipeline.config.prune import PruneConfig


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('record') / 'mlflow.db'}"


@pytest.fixture
def recorded(database: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Runs are recorded in the session's database, and the working directory is the test's own."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    monkeypatch.chdir(tmp_path)
    return database


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make(family=..., dtype=..., tied=..., sharded=..., blocks=...) -> a tiny checkpoint that reads ASCII text."""

    @cache
    def make(**kind: Any) -> Path:
        directory = tmp_path_factory.mktemp("model") / "tiny"
        shutil.copytree(tiny_checkpoint(**kind), directory)
        add_tokenizer(directory)
        return directory

    return make


@pytest.fixture
def model(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny Llama of the test's own, to break."""
    return Path(shutil.copytree(tiny_model(), tmp_path / "model"))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 4000, seed=1)


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "held-out.txt", 500, seed=2)


@pytest.fixture
def request_for(tmp_path: Path, tiny_model: Callable[..., Path], text: Path) -> Callable[..., PruneConfig]:
    """make(**options) -> a small pruning request; the tiny Llama into tmp_path/"out" by Wanda, component by component,
    unless they say otherwise."""

    def make(**options: Any) -> PruneConfig:
        usual = {
            "model": str(options.pop("model", None) or tiny_model()),
            "output": str(tmp_path / "out"),
            "calibration": str(text),
            "samples": SAMPLES,
            "length": LENGTH,
            "microbatch": MICROBATCH,
            "shards": 1,
            "criterion": "wanda",
            "reconstruct": "component",
        }
        return PruneConfig(**(usual | options))

    return make
