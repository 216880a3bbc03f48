"""config.json as people have it: read as transformers means it, or refused in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from espalier.stages.errors import Refusal
from espalier.stages.loading.skeleton import read_config

Made = Callable[..., Path]


@pytest.fixture
def model(tiny_checkpoint: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint(), tmp_path / "model"))


def saying(model: Path, **values: Any) -> Path:
    """The model with these values in its config.json; None removes one."""
    config = json.loads((model / "config.json").read_text()) | values
    kept = {name: value for name, value in config.items() if value is not None}
    (model / "config.json").write_text(json.dumps(kept))
    return model


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", r"cannot be read \(empty\)"),
        (b" \n", r"cannot be read \(empty\)"),
        (b"{", r"cannot be read \(Expecting property name"),
        (b"[]", r"cannot be read \(a list, not an object\)"),
        (b'"llama"', r"cannot be read \(a str, not an object\)"),
        (b"\xff\xfe{\0}\0", r"cannot be read \('utf-8' codec"),
        (b'{"hidden_size": 8, "name": "\xff"}', r"cannot be read \('utf-8' codec"),
        (b"{}", "names no model_type"),
        (b'{"model_type": ""}', "names no model_type"),
        (b'{"model_type": 3}', "names no model_type"),
        (b'{"model_type": "llama", "hidden_size": "wide"}', r"transformers cannot read it \("),
    ],
)
def test_a_config_that_cannot_be_read(tmp_path: Path, text: bytes, said: str) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(Refusal, match=rf"config\.json: {said}") as refusal:
        read_config(tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_config_with_a_byte_order_mark_is_read(model: Path) -> None:
    before = read_config(model).to_dict()
    (model / "config.json").write_bytes(b"\xef\xbb\xbf" + (model / "config.json").read_bytes())
    assert read_config(model).to_dict() == before


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        ("torch.bfloat16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("bf16", torch.bfloat16),
        ("torch.float16", torch.float16),
        ("half", torch.float16),
        ("fp32", torch.float32),
        ("auto", None),
        ({"": "torch.bfloat16", "vision": "float32"}, torch.bfloat16),
    ],
)
def test_a_dtype_as_people_write_it(model: Path, key: str, value: Any, dtype: torch.dtype | None) -> None:
    assert read_config(saying(model, **{"dtype": None, "torch_dtype": None, key: value})).dtype == dtype


def test_of_two_dtypes_the_newer_name_wins_as_in_transformers(model: Path) -> None:
    assert read_config(saying(model, dtype="torch.float16", torch_dtype="torch.bfloat16")).dtype == torch.float16


def test_only_the_dtype_of_a_mended_config_changes(model: Path) -> None:
    plain = read_config(saying(model, dtype="bfloat16"))
    mended = read_config(saying(model, dtype="torch.bfloat16"))
    assert mended.to_dict() == plain.to_dict() and type(mended) is type(plain)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_of_the_text_part_is_that_of_a_model_that_states_none(tmp_path: Path, key: str) -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "llama", key: "torch.bfloat16"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = read_config(tmp_path)
    assert read.dtype == torch.bfloat16 and read.get_text_config().dtype == torch.bfloat16


@pytest.mark.parametrize("value", ["float8_e4m3fn", "torch.float8_e4m3fn", "fp8", "int8"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_dtype_of_eight_bits_is_refused_with_the_way_back(model: Path, value: str, inside: bool) -> None:
    with pytest.raises(Refusal, match=r"dtype '.*' says that the weights are quantised.*FineGrainedFP8Config"):
        read_config(saying(model, **({"text_config": {"dtype": value}} if inside else {"dtype": value})))


@pytest.mark.parametrize("value", ["wide", 16, ["bfloat16"]])
def test_a_dtype_that_is_none_is_refused(model: Path, value: Any) -> None:
    with pytest.raises(Refusal, match=r"config\.json: dtype .* is none of float32, bfloat16, float16, float64"):
        read_config(saying(model, dtype=value))


@pytest.mark.parametrize(
    ("method", "way"),
    [
        ("fp8", r"FineGrainedFP8Config\(dequantize=True\)"),
        ("compressed-tensors", r"CompressedTensorsConfig\(dequantize=True\)"),
        ("mxfp4", r"Mxfp4Config\(dequantize=True\)"),
        ("bitsandbytes", r"\.dequantize\(\)"),
        ("gptq", "prune the original checkpoint; quantise the result"),
        ("awq", "prune the original checkpoint; quantise the result"),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_a_quantised_checkpoint_is_refused_with_the_way_back(model: Path, method: str, way: str, inside: bool) -> None:
    section = {"quantization_config": {"quant_method": method}}
    with pytest.raises(Refusal, match=f"quantised by {method}; .*{way}"):
        read_config(saying(model, **({"text_config": section} if inside else section)))


@pytest.mark.parametrize("section", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("said", [{"bits": 4}, "int4"])
def test_quantisation_of_any_shape_is_refused(model: Path, section: str, said: Any) -> None:
    with pytest.raises(Refusal, match="quantised by "):
        read_config(saying(model, **{section: said}))


def test_quantisation_told_only_by_a_file_beside_the_config(model: Path) -> None:
    told = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}
    (model / "hf_quant_config.json").write_text(json.dumps(told))
    with pytest.raises(Refusal, match=r"quantised by ModelOpt's NVFP4 \(hf_quant_config\.json\); prune the original"):
        read_config(model)
    told["quantization"]["quant_algo"] = None  # the cache alone: the weights are plain
    (model / "hf_quant_config.json").write_text(json.dumps(told))
    assert read_config(model).model_type == "llama"
    (model / "hf_quant_config.json").write_text("[]")
    with pytest.raises(Refusal, match=r"hf_quant_config\.json: cannot be read"):
        read_config(model)


def test_the_way_back_from_fp8_gives_the_plain_weights(tiny_checkpoint: Made, tmp_path: Path) -> None:
    """What the refusal advises, done: transformers saves scales and all unless it is told not to."""
    model = Path(shutil.copytree(tiny_checkpoint(dtype="bfloat16"), tmp_path / "fp8"))
    plain, stored = load_file(model / "model.safetensors"), {}
    for name, weight in plain.items():
        stored[name] = weight
        if ".layers." in name and weight.dim() == 2:
            scale = weight.float().abs().max() / 448
            stored[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale.reshape(1, 1)
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    saying(model, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(Refusal, match=r"save_original_format=False"):
        read_config(model)
    dequantised = AutoModelForCausalLM.from_pretrained(model, quantization_config=FineGrainedFP8Config(dequantize=True))
    dequantised.save_pretrained(tmp_path / "plain", save_original_format=False)
    assert read_config(tmp_path / "plain").dtype == torch.bfloat16
    found = load_file(tmp_path / "plain" / "model.safetensors")
    assert found.keys() == plain.keys()
    for name, weight in found.items():
        assert weight.dtype == torch.bfloat16
        assert (weight.float() - plain[name].float()).abs().max() <= plain[name].float().abs().max() / 16


def test_an_empty_quantization_config_quantises_nothing_and_goes(model: Path) -> None:
    read = read_config(saying(model, quantization_config={}))
    assert not hasattr(read, "quantization_config")
