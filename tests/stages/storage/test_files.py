"""Files that appear whole under their name, with the mode of any new file, or not at all."""

import os
import re
import stat
from pathlib import Path

import pytest
import torch

from espalier.stages.storage.files import move_into_place, replacing, write_text
from espalier.stages.storage.hf_checkpoint import write_tensors


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(("umask", "wanted"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_are_for_whom_the_umask_lets_read(tmp_path: Path, umask: int, wanted: int) -> None:
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "w.safetensors", {"w": torch.ones(3)})
        write_text(tmp_path / "run.json", "{}")
        write_text(tmp_path / "run.json", "[]")  # a file that was there before, too
    finally:
        os.umask(before)
    assert {path.name: mode(path) for path in tmp_path.iterdir()} == {"w.safetensors": wanted, "run.json": wanted}


def test_what_fails_midway_leaves_the_older_file(tmp_path: Path) -> None:
    write_text(tmp_path / "run.json", "old")

    class Full(Exception):
        pass

    with pytest.raises(Full), replacing(tmp_path / "run.json") as temporary:
        temporary.write_text("ne")
        raise Full
    assert os.listdir(tmp_path) == ["run.json"]
    assert (tmp_path / "run.json").read_text() == "old"


def test_nothing_stands_under_the_name_before_all_is_written(tmp_path: Path) -> None:
    with replacing(tmp_path / "run.json") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "run.json").exists()
    assert (tmp_path / "run.json").read_text() == "new"


def test_what_was_gathered_takes_its_place_and_what_was_there_is_gone(tmp_path: Path) -> None:
    gathered, final = tmp_path / "gathering", tmp_path / "checkpoint"
    for directory, name in ((final, "old"), (gathered, "new")):
        (directory / "inside").mkdir(parents=True)
        (directory / "inside" / name).write_text(name)
    move_into_place(gathered, final)
    assert sorted(path.name for path in final.rglob("*")) == ["inside", "new"]
    move_into_place(final / "inside" / "new", tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "new"]


def test_nobody_else_gives_files_their_names() -> None:
    """MLflow's database is the exception: of two processes that make one, the first wins."""
    floors = [Path(__file__).parents[3] / floor for floor in ("stages", "cluster", "pipeline")]
    texts = {path.name: path.read_text() for floor in floors for path in floor.rglob("*.py")}
    renames = {name for name, text in texts.items() if re.search(r"os\.(replace|rename)\(|\.rename\(", text)}
    assert renames == {"files.py", "mlflow_client.py"}
