"""The invariant: however a model is cut and wherever its activations wait, the bits are the same."""

import hashlib
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from streaming import GENTLE, make_shards, microbatches, prune, same_bits, stream, whole_model

from espalier.stages.recipe import Recipe

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LENGTH = 20  # longer than the sliding windows
UNTIED_CUTS = [(1, "all"), (3, "one")]
TIED_CUTS = [(2, "all"), (4, "all"), (1, "one")]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_to_four_shards_give_the_whole_models_logits(
    tiny_checkpoint, tiny_tokens, tmp_path, family, dtype, tied
) -> None:
    directory = tiny_checkpoint(family, dtype, tied=tied, sharded=(dtype == "float32") != tied)
    assert (directory / "model.safetensors.index.json").exists() == ((dtype == "float32") != tied)
    tokens = tiny_tokens(5, LENGTH)  # two microbatches of two samples, one of one
    whole = whole_model(directory, getattr(torch, dtype))
    expected = [whole(part) for part in microbatches(tokens)]
    for count, resident in TIED_CUTS if tied else UNTIED_CUTS:
        shards = make_shards(directory, tmp_path, count, LENGTH, resident=resident, spool_memory=1000)
        logits = [shards[-1].logits(hidden) for hidden in stream(shards, tokens)]
        for number, (ours, theirs) in enumerate(zip(logits, expected, strict=True)):
            assert same_bits(ours, theirs), f"{count} shards, resident {resident}, microbatch {number}"


def test_the_sliding_window_is_seen(tiny_checkpoint, tiny_tokens, tmp_path) -> None:
    """Guards the test above: a token outside the window matters not to Mistral's first block, but to Llama's."""
    tokens = tiny_tokens(1, LENGTH)
    changed = tokens.clone()
    changed[0, 0] = (tokens[0, 0] + 1) % 100 + 3
    moved = {}
    for family in ("mistral", "llama"):
        shard = make_shards(tiny_checkpoint(family), tmp_path, 4, LENGTH)[0]  # one block
        moved[family] = not torch.equal(stream([shard], tokens)[0][0, -1], stream([shard], changed)[0][0, -1])
    assert moved == {"mistral": False, "llama": True}


ROPES = {
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0},
    "dynamic": {"factor": 2.0},  # its table depends on the length of what is run
    "yarn": {"factor": 4.0},
}


def odd_checkpoint(source: Path, directory: Path, kind: str) -> Path:
    """A copy of a tied checkpoint with one of the oddities that published ones have."""
    shutil.copytree(source, directory)
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    if kind == "head stored too":
        tensors["lm_head.weight"] = embedding.clone()
    elif kind == "another head stored":
        tensors["lm_head.weight"] = embedding.flip(0).contiguous()
    elif kind == "head stored only":
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    elif kind == "old names in config":
        config["torch_dtype"], config["rope_theta"] = config.pop("dtype"), 5000.0
        del config["rope_parameters"]
    elif kind == "dropout":
        config["attention_dropout"] = 0.5
    else:
        config["max_position_embeddings"] = 16
        config["rope_parameters"] = {
            "rope_type": kind,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 16,
        } | ROPES[kind]
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(
    "kind", ["head stored too", "another head stored", "head stored only", "old names in config", "dropout", *ROPES]
)
def test_odd_checkpoints_run_as_transformers_runs_them(tiny_checkpoint, tiny_tokens, tmp_path, kind) -> None:
    directory = odd_checkpoint(tiny_checkpoint("llama", tied=True), tmp_path / "model", kind)
    tokens = tiny_tokens(2, LENGTH)
    shards = make_shards(directory, tmp_path, 2, LENGTH)
    assert same_bits(shards[-1].logits(stream(shards, tokens)[0]), whole_model(directory, torch.float32)(tokens))


@pytest.mark.parametrize("name", ["stories260k", "pystdlib-5m"])
def test_trained_models_run_as_transformers_runs_them(shared_folder, tiny_tokens, tmp_path, name) -> None:
    directory, tokens = shared_folder("models", name), tiny_tokens(3, 64)
    blocks = json.loads((directory / "config.json").read_text())["num_hidden_layers"]
    shards = make_shards(directory, tmp_path, 2, 64, blocks=blocks)
    whole = whole_model(directory, shards[0].skeleton.dtype)
    for hidden, part in zip(stream(shards, tokens), microbatches(tokens), strict=True):
        assert same_bits(shards[-1].logits(hidden), whole(part))


def digests(directory) -> dict[str, str]:
    files = sorted((directory / "output").iterdir())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


VARIANTS = [
    {"shards": 2, "spool_memory": 0},
    {"shards": 3, "resident": "one", "spool_memory": 5000},
]


@pytest.mark.parametrize(
    ("family", "dtype", "reconstruct"),
    [
        ("llama", "float32", "component"),
        ("qwen3", "bfloat16", "component"),
        *(
            pytest.param(*one, "none", marks=pytest.mark.slow)  # what a fit is made of is in the two above
            for one in (("qwen2", "bfloat16"), ("mistral", "float32"))
        ),
    ],
)
def test_pruned_files_are_the_same_bytes_for_any_cut_and_any_spool(
    tiny_checkpoint, tiny_tokens, tmp_path, family, dtype, reconstruct
) -> None:
    directory, tokens = tiny_checkpoint(family, dtype, blocks=3), tiny_tokens(8, LENGTH)
    recipe = Recipe(reconstruct=reconstruct, seed=3, learning_rate=GENTLE)
    seen = []
    for number, variant in enumerate([{"shards": 1}, *VARIANTS]):
        home = tmp_path / str(number)
        prune(make_shards(directory, home, length=LENGTH, blocks=3, recipe=recipe, **variant), tokens)
        assert not list((home / "scratch").rglob("*.arrow")), f"{variant} left spools behind"
        seen.append(digests(home))
    assert sorted(seen[0]) == [f"model-block-{index:05d}.safetensors" for index in range(3)]
    for variant, files in zip(VARIANTS, seen[1:], strict=True):
        assert files == seen[0], variant


def test_reconstruction_changes_the_files(tiny_checkpoint, tiny_tokens, tmp_path) -> None:
    """Guards the test above: equal bytes would mean little if fitting did nothing."""
    directory, tokens = tiny_checkpoint("llama", blocks=1), tiny_tokens(8, LENGTH)
    seen = []
    for number, recipe in enumerate(
        [Recipe(reconstruct="none"), Recipe(learning_rate=GENTLE), Recipe(seed=1, learning_rate=GENTLE)]
    ):
        prune(make_shards(directory, tmp_path / str(number), 1, LENGTH, blocks=1, recipe=recipe), tokens)
        seen.append(digests(tmp_path / str(number)))
    assert all(left[name] != right[name] for left, right in itertools.combinations(seen, 2) for name in left)
