"""Reading and writing checkpoints: headers first, refusals that name file and remedy, files whole or absent."""

import errno
import hashlib
import json
import math
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from espalier.stages.errors import Refusal
from espalier.stages.storage import files
from espalier.stages.storage import hf_checkpoint as checkpoint
from espalier.stages.storage.files import file_digest
from espalier.stages.storage.headers import INDEX, TensorEntry
from espalier.stages.storage.hf_checkpoint import Checkpoint, grouped, resolve, write_tensors


@pytest.fixture
def sharded(tmp_path) -> Path:
    """Two files and an index."""
    save_file({"a": torch.arange(6.0).reshape(2, 3)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(4, dtype=torch.bfloat16), "c": torch.arange(3)}, tmp_path / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def test_headers_tell_what_is_where(sharded) -> None:
    entries = Checkpoint(sharded).entries
    assert entries["a"] == TensorEntry("a", "one.safetensors", (2, 3), "F32")
    assert (entries["a"].elements, entries["a"].bytes) == (6, 24)
    assert (entries["b"].file, entries["b"].bytes) == ("two.safetensors", 8)
    assert "c" in Checkpoint(sharded)
    assert "d" not in Checkpoint(sharded)


def test_only_floating_point_tensors_change_their_dtype(sharded) -> None:
    loaded = Checkpoint(sharded).load(["c", "a", "b"], dtype=torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in loaded.items()} == {
        "a": torch.bfloat16,
        "b": torch.bfloat16,
        "c": torch.int64,
    }
    assert torch.equal(loaded["a"].float(), torch.arange(6.0).reshape(2, 3))


def test_what_was_loaded_outlives_its_file(sharded) -> None:
    loaded = Checkpoint(sharded).load(["a"])
    (sharded / "one.safetensors").write_bytes(b"\0" * 500)
    assert torch.equal(loaded["a"], torch.arange(6.0).reshape(2, 3))


def test_no_such_model(tmp_path) -> None:
    with pytest.raises(Refusal, match=r"/nowhere: no such model directory"):
        resolve(str(tmp_path / "nowhere"))


def test_a_hub_id_without_a_hub(monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Refusal, match=r"nobody/nothing-at-all: no such directory, and the hub"):
        resolve("nobody/nothing-at-all")


def test_a_file_instead_of_a_directory(sharded) -> None:
    with pytest.raises(Refusal, match=r"one\.safetensors: a file, not a checkpoint directory"):
        resolve(str(sharded / "one.safetensors"))


def test_a_directory_without_a_config(sharded) -> None:
    with pytest.raises(Refusal, match=r"no config\.json in it"):
        resolve(str(sharded))
    (sharded / "config.json").write_text("{}")
    assert resolve(str(sharded)) == sharded.resolve()


def test_pickles_are_never_read(tmp_path) -> None:
    with pytest.raises(Refusal, match=r"no \*\.safetensors in it"):
        Checkpoint(tmp_path)
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Refusal, match=r"only pickled weights \(pytorch_model\.bin\)"):
        Checkpoint(tmp_path)


def test_several_files_without_an_index(sharded) -> None:
    (sharded / INDEX).unlink()
    with pytest.raises(Refusal, match=f"2 safetensors files but no {INDEX}"):
        Checkpoint(sharded)


def test_a_missing_shard_file(sharded) -> None:
    (sharded / "two.safetensors").unlink()
    with pytest.raises(Refusal, match=r"two\.safetensors: listed in .* but missing"):
        Checkpoint(sharded)


@pytest.mark.parametrize("left", [0, 4, 60, -1])
def test_a_truncated_file(sharded, left) -> None:
    whole = (sharded / "two.safetensors").read_bytes()
    (sharded / "two.safetensors").write_bytes(whole[:left])
    with pytest.raises(Refusal, match=r"two\.safetensors: truncated or not a safetensors file \(\d+ bytes"):
        Checkpoint(sharded)


def test_an_index_that_promises_what_is_not_there(sharded) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["lost"] = "one.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(Refusal, match=r"one\.safetensors: .* promises lost in it"):
        Checkpoint(sharded)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": null}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../one.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": ""}}',
    ],
)
def test_an_unreadable_index(sharded, text) -> None:
    (sharded / INDEX).write_text(text)
    with pytest.raises(Refusal, match=rf"{INDEX}: not a safetensors index"):
        Checkpoint(sharded)


def test_a_tensor_that_is_not_there(sharded) -> None:
    with pytest.raises(Refusal, match=r"no tensor model\.norm\.weight; the checkpoint does not match its config\.json"):
        Checkpoint(sharded).load(["a", "model.norm.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_weight_far_inside_a_large_tensor_is_named(tmp_path, dtype, bad) -> None:
    tensor = torch.ones(700, 1000, dtype=dtype)
    tensor[433, 777] = bad
    save_file({"good": torch.ones(3), "model.bad.weight": tensor}, tmp_path / "model.safetensors")
    with pytest.raises(Refusal, match=r"model\.safetensors: model\.bad\.weight: 1 of 700000 weights are NaN or inf"):
        Checkpoint(tmp_path).load(["good", "model.bad.weight"], dtype=torch.float32)


def test_infinities_that_cancel_are_found(tmp_path) -> None:
    save_file({"w": torch.tensor([math.inf, 1.0, -math.inf])}, tmp_path / "model.safetensors")
    with pytest.raises(Refusal, match="w: 2 of 3 weights"):
        Checkpoint(tmp_path).load(["w"])


def test_weights_beyond_the_range_of_the_wanted_dtype(tmp_path) -> None:
    save_file({"w": torch.tensor([1e6, 1.0])}, tmp_path / "model.safetensors")
    with pytest.raises(Refusal, match=r"w: 1 of 2 weights are NaN or infinite as float16; .*--dtype"):
        Checkpoint(tmp_path).load(["w"], dtype=torch.float16)


def test_large_finite_weights_are_welcome(tmp_path) -> None:
    save_file({"w": torch.full((1000,), 3e38)}, tmp_path / "model.safetensors")  # their sum overflows
    assert Checkpoint(tmp_path).load(["w"])["w"].isfinite().all()


def test_groups_keep_the_order_and_the_limit() -> None:
    entries = [TensorEntry(str(number), "f", (size,), "F32") for number, size in enumerate([1, 2, 3, 100, 1, 1, 30])]
    groups = grouped(entries, 6 * 4)
    assert [[int(entry.name) for entry in group] for group in groups] == [[0, 1, 2], [3], [4, 5], [6]]
    assert grouped([], 10) == []


def test_a_digest_is_the_files_sha256(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(files, "READ_CHUNK", 1000)
    path = tmp_path / "w.safetensors"
    digest = write_tensors(path, {"w": torch.randn(999)})
    assert digest == file_digest(path) == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_views_and_gradients_are_written_as_plain_tensors(tmp_path) -> None:
    matrix = torch.randn(4, 6, requires_grad=True)
    write_tensors(tmp_path / "w.safetensors", {"view": matrix.T, "part": matrix[1:3]})
    loaded = load_file(tmp_path / "w.safetensors")
    assert torch.equal(loaded["view"], matrix.T)
    assert torch.equal(loaded["part"], matrix[1:3])


def test_a_rewrite_replaces_the_file_whole(tmp_path) -> None:
    path = tmp_path / "w.safetensors"
    write_tensors(path, {"w": torch.zeros(10)})
    write_tensors(path, {"w": torch.ones(10)})
    assert torch.equal(load_file(path)["w"], torch.ones(10))


@pytest.mark.parametrize("step", ["save_file", "file_digest"])
def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, step) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, step, full)
    with pytest.raises(Refusal, match=r"w\.safetensors: disk full \(\d+ MiB free\)"):
        write_tensors(tmp_path / "w.safetensors", {"w": torch.ones(10)})
    assert os.listdir(tmp_path) == []


def test_another_error_of_the_file_system_is_not_called_a_full_disk(tmp_path, monkeypatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(OSError, match="Input/output error"):
        write_tensors(tmp_path / "w.safetensors", {"w": torch.ones(10)})
    assert os.listdir(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip("may not mount a small file system here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full(small_disk) -> None:
    path = small_disk / "w.safetensors"
    write_tensors(path, {"w": torch.zeros(1000)})
    before = path.read_bytes()
    with pytest.raises(Refusal, match=r"disk full .*espalier resume"):
        write_tensors(path, {"w": torch.ones(1_000_000)})
    assert os.listdir(small_disk) == ["w.safetensors"]
    assert path.read_bytes() == before  # the older file is still whole
