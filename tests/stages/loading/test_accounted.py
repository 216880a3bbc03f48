"""No tensor of a checkpoint is lost or taken for what it is not: seen from headers, before any work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from streaming import make_shards, same_bits
from torch import Tensor

from espalier.pipeline.planning.model_info import ModelInfo, model_facts
from espalier.stages.errors import Refusal
from espalier.stages.loading.skeleton import read_config
from espalier.stages.storage.hf_checkpoint import Checkpoint, resolve

Made = Callable[..., Path]
Q = "model.layers.2.self_attn.q_proj.weight"


@pytest.fixture
def model(tiny_checkpoint: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint(), tmp_path / "model"))


def change(model: Path, *gone: str, **more: Tensor) -> Path:
    """The model without these tensors and with others."""
    tensors = {name: t for name, t in load_file(model / "model.safetensors").items() if name not in gone}
    save_file(tensors | more, model / "model.safetensors", {"format": "pt"})
    return model


def facts_of(model: Path) -> ModelInfo:
    return model_facts(read_config(model), str(model), checkpoint=Checkpoint(model))


EXTRA = {
    "model.layers.4.eh_proj.weight": torch.randn(4, 8).half(),  # a layer that predicts one token more
    "model.layers.4.mlp.down_proj.weight": torch.full((3, 3), torch.nan, dtype=torch.bfloat16),
    "model.layers.4.mlp.up_proj.weight": torch.arange(6, dtype=torch.uint8).reshape(2, 3).view(torch.float8_e4m3fn),
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4, dtype=torch.float64),
    "adapter.steps": torch.tensor(3),
    "adapter.mask": torch.tensor([True, False]),
    "adapter.bytes": torch.tensor([-3, 7], dtype=torch.int8),
    "nothing": torch.zeros(0, 5),
}


def test_what_the_model_does_not_read_is_copied_bit_for_bit(model: Path, tmp_path: Path) -> None:
    before = load_file(model / "model.safetensors")
    shard = make_shards(change(model, **EXTRA), tmp_path, 1, 8)[0]
    shard.copy_ends()
    found = {}
    for file in sorted((tmp_path / "output").glob("*.safetensors")):
        found |= load_file(file)
    assert set(found) == {*EXTRA, *(name for name in before if ".layers." not in name)}
    for name, tensor in EXTRA.items():
        assert same_bits(found[name], tensor), name


def test_it_is_told_in_one_line(model: Path) -> None:
    assert facts_of(model).remarks == ()
    [line] = facts_of(change(model, **EXTRA)).remarks
    assert line.startswith(
        "8 tensors that LlamaForCausalLM does not read (copied unchanged where something is written): "
    )
    assert line.count(",") == 2 and line.endswith(" and 5 more")
    [line] = facts_of(change(model, *(name for name in EXTRA if name != "adapter.steps"))).remarks
    assert line.startswith("1 tensor that ") and line.endswith(" written): adapter.steps")


def test_it_counts_as_what_the_disk_must_hold(model: Path) -> None:
    before = facts_of(model).total_bytes
    assert facts_of(change(model, **EXTRA)).total_bytes == before + sum(t.nbytes for t in EXTRA.values())


def test_files_that_are_not_read_are_told(model: Path) -> None:
    save_file({"w": torch.ones(2)}, model / "consolidated.safetensors")
    [line] = facts_of(model).remarks
    assert line.startswith("not read, as transformers does not read it") and line.endswith(": consolidated.safetensors")


def test_a_missing_head_that_is_not_tied_says_what_transformers_would_do(model: Path) -> None:
    with pytest.raises(Refusal, match=r"no tensor lm_head\.weight, and .*false: .* at random; .*true"):
        facts_of(change(model, "lm_head.weight"))


def test_a_missing_head_that_is_tied_is_the_embedding(tiny_checkpoint: Made) -> None:
    tied = tiny_checkpoint(tied=True)
    assert "lm_head.weight" not in Checkpoint(tied).entries
    assert facts_of(tied).remarks == ()


@pytest.mark.parametrize("name", [Q, "model.norm.weight", "model.embed_tokens.weight"])
def test_another_missing_tensor_is_named(model: Path, name: str) -> None:
    with pytest.raises(Refusal, match=rf"no tensor {name}; the checkpoint does not match its config\.json"):
        facts_of(change(model, name))


def test_a_name_in_other_capitals_is_pointed_out(model: Path) -> None:
    with pytest.raises(Refusal, match=r"no tensor model\.norm\.weight \(there is model\.Norm\.weight"):
        facts_of(change(model, "model.norm.weight", **{"model.Norm.weight": torch.ones(32)}))


@pytest.mark.parametrize("name", [Q, "model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
def test_weights_of_eight_bits_are_refused_from_the_headers(model: Path, name: str, dtype: torch.dtype) -> None:
    weight = load_file(model / "model.safetensors")[name]
    with pytest.raises(Refusal, match=rf"{name} is stored as (F8|I8|U8).*, quantised or .*; prune the original"):
        facts_of(change(model, **{name: weight.to(dtype), f"{name}_scale": torch.ones(1)}))


@pytest.mark.parametrize("packed", ["weight_packed", "qweight", "weight_blocks"])
def test_packed_weights_under_another_name_are_told_as_such(model: Path, packed: str) -> None:
    name = Q.removesuffix("weight") + packed
    with pytest.raises(Refusal, match=rf"{name} is stored as I32, quantised or"):
        facts_of(change(model, Q, **{name: torch.ones(8, 4, dtype=torch.int32)}))


@pytest.mark.parametrize("name", ["base_layer.weight", "lora_A.default.weight"])
def test_an_adapter_inside_the_model_is_to_be_merged(model: Path, name: str) -> None:
    with pytest.raises(Refusal, match=rf"{name} in place of {Q}: an adapter that is not merged; merge it first"):
        facts_of(change(model, Q, **{Q.removesuffix("weight") + name: torch.ones(32, 32)}))


@pytest.mark.parametrize("name", [Q, "model.embed_tokens.weight", "model.norm.weight"])
def test_another_shape_than_the_config_says(model: Path, name: str) -> None:
    with pytest.raises(Refusal, match=rf"model\.safetensors: {name} is \(3, 5\), config\.json says \("):
        facts_of(change(model, **{name: torch.ones(3, 5)}))


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_s_directory_is_to_be_merged_first(model: Path, whole: bool) -> None:
    told = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-3.1-8B"}
    (model / "adapter_config.json").write_text(json.dumps(told))
    if not whole:
        (model / "config.json").unlink()
    with pytest.raises(Refusal, match=r"an adapter \(LoRA\) of meta-llama/Llama-3\.1-8B, .*merge_and_unload\(\)"):
        resolve(str(model))
    (model / "adapter_config.json").write_text("[]")
    with pytest.raises(Refusal, match=r"an adapter \(LoRA\) of its base model"):
        resolve(str(model))
