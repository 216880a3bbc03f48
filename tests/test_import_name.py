"""One import name: all of ours is `espalier. ...`, in a checkout, an editable install and a wheel; and modules of a
user's that have names of our folders neither break a run nor are broken by it."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from whole_runs import LENGTH, MICROBATCH, SAMPLES, Command, add_tokenizer, users_modules, weights_of, write_text

import espalier

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("pipeline", "cluster", "stages")
LOOK = """
import importlib.util, json, sys
import espalier, espalier.stages.masks, espalier.pipeline.demo.run, espalier.pipeline.config.track as track
light = not {"torch", "ray", "mlflow"} & set(sys.modules)
import espalier.pipeline.pruning.prune, espalier.cluster.shard_group
ours = [module for name, module in sys.modules.items() if name.startswith("espalier") and module.__file__]
files = [__import__("os").path.realpath(module.__file__) for module in ours]
print(json.dumps({
    "bare": [name for name in ("pipeline", "cluster", "stages") if importlib.util.find_spec(name)],
    "twice": len(files) - len(set(files)), "here": espalier.__file__,
    "data": espalier.pipeline.demo.run.MODEL.is_dir() and bool(list(track.RECIPES.glob("*.yaml"))),
    "typed": (__import__("pathlib").Path(espalier.__file__).parent / "py.typed").exists(),
}))
"""


def test_the_public_names_are_there_and_cost_nothing_until_they_are_asked_for() -> None:
    program = "import espalier, sys; print(*espalier.__all__, 'torch' in sys.modules, 'ray' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert said[-2:] == ["False", "False"]
    assert {"PruneConfig", "Refusal", "compare", "evaluate", "load", "prune", "retrain", "track"} <= set(said)
    for name in espalier.__all__:
        assert getattr(espalier, name).__module__.startswith("espalier."), name
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        espalier.prunes  # noqa: B018


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of its own: what a build leaves beside the code is left there."""
    checkout = tmp_path_factory.mktemp("checkout") / "espalier-llm"
    kept = ("pyproject.toml", "README.md", "LICENSE", *FLOORS)
    checkout.mkdir()
    for name in kept:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, checkout / name)
    shutil.copytree(ROOT / "espalier", checkout / "espalier", symlinks=True)
    return checkout


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A fresh virtual environment that has what Espalier stands on, and not Espalier."""
    home = tmp_path / "environment"
    venv.create(home, with_pip=False, symlinks=True)
    (site,) = home.glob("lib/python*/site-packages")
    (site / "what-is-stood-on.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files are not read
    return home


def install(environment: Path, *what: str) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), "install", "--quiet"]
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--ignore-installed"]
    done = subprocess.run([*command, *offline, *what], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wheel", "editable", "checkout"])
def test_every_kind_of_install_sees_the_same_modules_once(
    environment: Path, sources: Path, tmp_path: Path, how: str
) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if how == "wheel":
        install(environment, str(sources))
    elif how == "editable":
        install(environment, "--editable", str(sources))
    else:
        variables["PYTHONPATH"] = str(sources)
    empty = tmp_path / "empty"
    empty.mkdir()
    python = str(environment / "bin" / "python")

    def said(*arguments: str) -> str:
        done = subprocess.run(
            [python, *arguments], cwd=empty, env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    seen = json.loads(said("-c", LOOK))
    place = environment if how == "wheel" else sources
    assert Path(seen["here"]).resolve().is_relative_to(place.resolve())
    # In the root of a checkout the folders lie in sight, and nothing imports them by those names.
    assert seen["bare"] == ([*FLOORS] if how == "checkout" else [])
    assert (seen["twice"], seen["data"], seen["typed"]) == (0, True, True)
    assert said("-m", "espalier", "--version").startswith("espalier ")
    if how != "checkout":
        command = [str(environment / "bin" / "espalier"), "--help"]
        assert "prune" in subprocess.run(command, cwd=empty, env=variables, capture_output=True, text=True).stdout


@pytest.mark.ray
@pytest.mark.slow
def test_a_users_modules_of_our_folders_names_break_nothing(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    users = users_modules(tmp_path / "users")
    model = Path(shutil.copytree(tiny_checkpoint(), tmp_path / "model"))
    add_tokenizer(model)
    text = write_text(tmp_path / "text.txt", 4000, seed=1)
    variables = {
        "PYTHONPATH": os.pathsep.join([str(users), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}",
    }
    sizes = ("--samples", SAMPLES, "--length", LENGTH, "--microbatch", MICROBATCH)
    out = tmp_path / "pruned"
    pruning = ("prune", model, "--output", out, "--calibration", text, *sizes, "--shards", 2)
    run = Command([*pruning, "--criterion", "cluster.mine", "--reconstruct", "none"], variables, users)
    assert run.finish()[0] == 0, run.lines
    assert weights_of(out)
    training = ("retrain", out, "--output", tmp_path / "trained", "--data", text, "--masked", "--ranks", 2)
    run = Command([*training, "--steps", 2, "--batch", 2, "--length", LENGTH], variables, users)
    assert run.finish()[0] == 0, run.lines
