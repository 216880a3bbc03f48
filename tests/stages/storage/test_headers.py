"""Which files of a directory are the checkpoint: those that transformers would read, and never one outside it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from espalier.stages.errors import Refusal
from espalier.stages.storage.headers import INDEX, TensorEntry
from espalier.stages.storage.hf_checkpoint import Checkpoint

Made = Callable[..., Path]


@pytest.fixture
def sharded(tiny_checkpoint: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint(sharded=True), tmp_path / "sharded"))


def what_transformers_reads(directory: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(directory).state_dict()


def same_as_transformers(directory: Path) -> bool:
    theirs, checkpoint = what_transformers_reads(directory), Checkpoint(directory)
    ours = checkpoint.load(checkpoint.entries)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_one_file_wins_over_an_index_beside_it(sharded: Path, tiny_checkpoint: Made) -> None:
    other = tiny_checkpoint(seed=1)
    AutoModelForCausalLM.from_pretrained(other).save_pretrained(sharded)  # as a user leaves it
    if not (sharded / INDEX).exists():
        pytest.fail("save_pretrained has learnt to remove an index")
    shutil.copy(sharded / "model.safetensors", sharded / "kept")
    assert {entry.file for entry in Checkpoint(sharded).entries.values()} == {"model.safetensors"}
    assert same_as_transformers(sharded)
    wanted = load_file(other / "model.safetensors")["lm_head.weight"]
    assert torch.equal(Checkpoint(sharded).load(["lm_head.weight"])["lm_head.weight"], wanted)


def test_what_lies_beside_the_one_file_is_named(sharded: Path) -> None:
    assert Checkpoint(sharded).unread_files() == []
    shards = sorted(path.name for path in sharded.glob("model-*.safetensors"))
    save_file(what_transformers_reads(sharded), sharded / "model.safetensors", {"format": "pt"})
    assert Checkpoint(sharded).unread_files() == [*shards, INDEX]


@pytest.mark.parametrize("beside", ["adapter_model.safetensors", "consolidated.safetensors", "model.fp16.safetensors"])
@pytest.mark.parametrize("pieces", [True, False])
def test_other_weights_beside_the_model_are_no_shards(
    tiny_checkpoint: Made, tmp_path: Path, beside: str, pieces: bool
) -> None:
    directory = Path(shutil.copytree(tiny_checkpoint(sharded=pieces), tmp_path / "model"))
    save_file({"lm_head.weight": torch.ones(2)}, directory / beside)
    assert same_as_transformers(directory)
    assert Checkpoint(directory).unread_files() == [beside]


@pytest.mark.parametrize("alone", ["adapter_model.safetensors", "consolidated.00.safetensors"])
def test_other_weights_alone_are_no_model(tmp_path: Path, alone: str) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / alone)
    with pytest.raises(Refusal, match=rf"no model\.safetensors in it but {alone}, which transformers does not read"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("named", ["other.safetensors", "other.safetensors.index.json"])
def test_a_file_that_the_config_names_wins(sharded: Path, named: str) -> None:
    weights = what_transformers_reads(sharded)
    save_file({name: tensor + 1 for name, tensor in weights.items()}, sharded / "other.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "other.safetensors")}
    (sharded / "other.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((sharded / "config.json").read_text()) | {"transformers_weights": named}
    (sharded / "config.json").write_text(json.dumps(config))
    assert {entry.file for entry in Checkpoint(sharded).entries.values()} == {"other.safetensors"}
    assert same_as_transformers(sharded)


def into(directory: Path, folder: str) -> None:
    """Moves the shards to a folder, and the index with them in mind."""
    (directory / folder).mkdir()
    index = json.loads((directory / INDEX).read_text())
    for file in set(index["weight_map"].values()):
        (directory / file).rename(directory / folder / file)
    index["weight_map"] = {name: f"{folder}/{file}" for name, file in index["weight_map"].items()}
    (directory / INDEX).write_text(json.dumps(index))


def test_an_index_may_name_folders(sharded: Path) -> None:
    into(sharded, "shards")
    assert same_as_transformers(sharded)


@pytest.mark.parametrize(
    "path", ["../one.safetensors", "shards/../../one.safetensors", "/etc/passwd", "..", "", "a\0b"]
)
def test_an_index_may_not_leave_the_directory(sharded: Path, path: str) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"w": path}}))
    with pytest.raises(Refusal, match=rf"{INDEX}: not a safetensors index \(.* is not the name of a file in"):
        Checkpoint(sharded)


def test_a_folder_that_is_a_link_elsewhere_is_not_followed(sharded: Path, tmp_path: Path) -> None:
    into(sharded, "shards")
    (sharded / "shards").rename(tmp_path / "elsewhere")
    (sharded / "shards").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refusal, match=r"'shards/model-.*' leads out of"):
        Checkpoint(sharded)


@pytest.mark.parametrize("pieces", [True, False])
def test_the_hub_s_cache_of_links_to_blobs_is_read(tiny_checkpoint: Made, tmp_path: Path, pieces: bool) -> None:
    (snapshot := tmp_path / "models--a--b" / "snapshots" / "0123").mkdir(parents=True)
    (blobs := tmp_path / "models--a--b" / "blobs").mkdir()
    for number, file in enumerate(sorted(tiny_checkpoint(sharded=pieces).iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert same_as_transformers(snapshot)
    (linked := tmp_path / "linked").symlink_to(snapshot)
    assert same_as_transformers(linked)


def test_a_tensor_in_two_files(sharded: Path) -> None:
    files = sorted(sharded.glob("model-*.safetensors"))
    name, tensor = next(iter(load_file(files[0]).items()))
    last = load_file(files[-1])
    save_file(last | {name: tensor}, files[-1], {"format": "pt"})
    assert same_as_transformers(sharded)  # the same twice is no harm
    save_file(last | {name: tensor + 1}, files[-1], {"format": "pt"})
    with pytest.raises(Refusal, match=rf"{name} lies in model-.* and, with other values, in model-.*; fetch both"):
        Checkpoint(sharded)
    save_file(last | {name: tensor.half()}, files[-1], {"format": "pt"})
    with pytest.raises(Refusal, match="with other values"):
        Checkpoint(sharded)


def test_tensors_that_the_index_does_not_list_are_there_all_the_same(sharded: Path) -> None:
    file = sorted(sharded.glob("model-*.safetensors"))[-1]
    save_file(load_file(file) | {"more": torch.ones(3)}, file, {"format": "pt"})
    assert Checkpoint(sharded).entry("more").file == file.name


def test_a_name_in_other_capitals_is_pointed_out(tmp_path: Path) -> None:
    save_file({"Model.Norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(Refusal, match=r"no tensor model\.norm\.weight \(there is Model\.Norm\.weight, and capitals"):
        Checkpoint(tmp_path).entry("model.norm.weight")


@pytest.mark.parametrize(
    "header",
    [b"\xff" * 8, b"\0" * 8, (2).to_bytes(8, "little") + b"[]", (9).to_bytes(8, "little") + b"not json!", b""],
)
def test_a_header_that_is_none(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(header)
    with pytest.raises(Refusal, match=r"model\.safetensors: truncated or not a safetensors file"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", [b"\xff\xfe{}", b"", b'{"weight_map": {}}', b'{"weight_map": {"a": []}}'])
def test_an_index_that_says_nothing(sharded: Path, text: bytes) -> None:
    (sharded / INDEX).write_bytes(text)
    with pytest.raises(Refusal, match=rf"{INDEX}: not a safetensors index"):
        Checkpoint(sharded)


@pytest.mark.parametrize(
    ("dtype", "size"), [("F8_E4M3", 6), ("I8", 6), ("BOOL", 6), ("F4", 3), ("F6_E2M3", 4), ("I64", 48), ("BF16", 12)]
)
def test_sizes_of_every_dtype(dtype: str, size: int) -> None:
    assert TensorEntry("w", "f", (2, 3), dtype).bytes == size


def test_copies_are_bit_for_bit_whatever_they_hold(tmp_path: Path) -> None:
    bits = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
    kinds = ("float8_e4m3fn", "float8_e8m0fnu", "float16", "bfloat16", "float32", "bool", "int8", "int64", "complex64")
    given = {kind: bits.clone().view(getattr(torch, kind)) for kind in kinds if kind != "bool"}  # NaN among them
    given |= {"bool": bits > 3, "nothing": torch.zeros(0, 3), "scalar": torch.tensor(3, dtype=torch.int32)}
    save_file(given, tmp_path / "model.safetensors")
    copied = Checkpoint(tmp_path).copies(given)
    for name, tensor in given.items():
        assert copied[name].dtype == tensor.dtype and copied[name].shape == tensor.shape
        assert torch.equal(copied[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
