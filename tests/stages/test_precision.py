"""What blocks are computed in, apart from what their weights are stored in: exact, the same for any cut, and every
tensor comes back in the dtype that it has in its file."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from streaming import GENTLE, make_shards, microbatches, prune, same_bits, stream, whole_model
from torch import nn

from espalier.stages import devices
from espalier.stages.errors import Refusal
from espalier.stages.loading.skeleton import read_config
from espalier.stages.model.empty import empty_model
from espalier.stages.precision import COMPUTED, chosen_compute, computing, note_dtypes, weights_dtype
from espalier.stages.recipe import Recipe
from espalier.stages.shard.spec import block_file
from espalier.stages.storage.hf_checkpoint import Checkpoint

LENGTH = 20
APART = [  # stored in, computed in
    ("bfloat16", "fp32"),
    ("float16", "fp32"),
    ("float32", "bf16"),
    ("float32", "fp16"),
    ("float16", "bf16"),
    ("float16", "fp16"),
    ("bfloat16", "fp16"),
]


@pytest.mark.parametrize(("stored", "compute"), APART)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_logits_are_those_of_the_model_that_transformers_loads_in_that_dtype(
    tiny_checkpoint, tiny_tokens, tmp_path, family, stored, compute
) -> None:
    directory, tokens = tiny_checkpoint(family, stored, tied=family == "qwen3"), tiny_tokens(3, LENGTH)
    whole = whole_model(directory, COMPUTED[compute])
    for count, resident in ((2, "all"), (3, "one")):
        shards = make_shards(directory, tmp_path, count, LENGTH, compute=compute, resident=resident)
        for hidden, part in zip(stream(shards, tokens), microbatches(tokens), strict=True):
            assert hidden.dtype == COMPUTED[compute]
            assert same_bits(shards[-1].logits(hidden), whole(part)), f"{count} shards, resident {resident}"
        for shard in shards:
            for block in shard.blocks.held.values():
                held = {parameter.dtype for parameter in block.parameters()}
                assert held == {getattr(torch, stored)}, "weights stay in memory as they are stored"


def mixed_checkpoint(source: Path, directory: Path, change: Callable[[str], torch.dtype], named: str | None) -> Path:
    """A copy in which each tensor has a dtype of its own, and config.json names `named`, or none."""
    shutil.copytree(source, directory)
    tensors = {name: t.to(change(name)) for name, t in load_file(directory / "model.safetensors").items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config.pop("dtype")
    (directory / "config.json").write_text(json.dumps(config | ({"dtype": named} if named else {})))
    return directory


def norms_wide(name: str) -> torch.dtype:
    return torch.float32 if "norm" in name else torch.bfloat16


@pytest.mark.parametrize("recipe", [Recipe(learning_rate=GENTLE), Recipe(reconstruct="none")], ids=["fitted", "masked"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("named", ["bfloat16", None], ids=["named", "unnamed"])
def test_every_tensor_comes_back_in_the_dtype_of_its_file(
    tiny_checkpoint, tiny_tokens, tmp_path, named, compute, recipe
) -> None:
    source = mixed_checkpoint(tiny_checkpoint("qwen3", blocks=2), tmp_path / "model", norms_wide, named)
    shards = make_shards(source, tmp_path, 1, LENGTH, blocks=2, compute=compute, recipe=recipe)
    prune(shards, tiny_tokens(8, LENGTH))
    ends = shards[0].copy_ends()
    files = [*(block_file(index) for index in range(2)), *ends]
    written = {name: tensor for file in files for name, tensor in load_file(tmp_path / "output" / file).items()}
    before = load_file(source / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in written.items()} == {n: t.dtype for n, t in before.items()}
    changed = {name for name in written if not same_bits(written[name], before[name])}
    weights = {name for name in before if ".layers." in name and ("proj" in name or "norm" in name)}
    fitted = weights if recipe.reconstruct != "none" else {name for name in weights if "proj" in name}
    assert changed <= fitted and {name for name in fitted if "proj" in name} <= changed


def test_a_dtype_that_was_asked_for_is_that_of_all_that_is_written(tiny_checkpoint, tiny_tokens, tmp_path) -> None:
    source = mixed_checkpoint(tiny_checkpoint("llama", blocks=1), tmp_path / "model", norms_wide, None)
    shards = make_shards(
        source, tmp_path, 1, LENGTH, blocks=1, dtype="float16", compute="fp32", recipe=Recipe(learning_rate=GENTLE)
    )
    prune(shards, tiny_tokens(8, LENGTH))
    files = [block_file(0), *shards[0].copy_ends()]
    assert {t.dtype for file in files for t in load_file(tmp_path / "output" / file).values()} == {torch.float16}


DTYPES = [("bfloat16", "fp32"), ("float16", "fp32"), ("float32", "bf16")]
FITTED = [{}, {"inputs": "pruned"}, {"reconstruct": "window", "blocks_per_unit": 2, "sweeps": 1}]


@pytest.mark.parametrize(
    ("stored", "compute", "recipe"),
    [  # each dtype and each recipe once, the rest slow
        pytest.param(
            *dtypes, recipe, marks=() if row == column else pytest.mark.slow, id=f"{'-'.join(dtypes)}-{column}"
        )
        for row, dtypes in enumerate(DTYPES)
        for column, recipe in enumerate(FITTED)
    ],
)
def test_the_files_are_the_same_for_any_cut_and_the_errors_fall(
    tiny_checkpoint, tiny_tokens, tmp_path, stored, compute, recipe
) -> None:
    directory, tokens = tiny_checkpoint("llama", stored), tiny_tokens(8, LENGTH)
    asked = Recipe(seed=3, learning_rate=GENTLE, **recipe)
    seen = []
    for number, (shards, resident, memory) in enumerate([(1, "all", 1 << 30), (2, "one", 5000)]):
        home = tmp_path / str(number)
        made = make_shards(
            directory, home, shards, LENGTH, compute=compute, resident=resident, spool_memory=memory, recipe=asked
        )
        reports = prune(made, tokens)
        files = sorted((home / "output").glob("model-*.safetensors"))
        seen.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
        units = [unit for report in reports for unit in report["units"]]
        assert all(unit["error_after"] <= unit["error_before"] for unit in units)
        assert any(unit["improved"] for unit in units)
        assert all(report["sparsity"] == 0.5 for report in reports)
        for file in files:
            for tensor in load_file(file).values():
                assert tensor.dtype == getattr(torch, stored) and torch.isfinite(tensor).all()
    assert len(seen[0]) == 4 and seen[0] == seen[1]


def test_a_mask_by_magnitude_is_that_of_the_stored_weights(tiny_checkpoint, tiny_tokens, tmp_path) -> None:
    """Rounded to what blocks are computed in, some weights would tie, and others go."""
    directory, tokens = tiny_checkpoint("llama", "float32", blocks=1), tiny_tokens(4, LENGTH)
    written = []
    for compute in ("fp32", "bf16"):
        recipe = Recipe(criterion="magnitude", reconstruct="none")
        shards = make_shards(directory, tmp_path / compute, 1, LENGTH, blocks=1, compute=compute, recipe=recipe)
        prune(shards, tokens)
        written.append((tmp_path / compute / "output" / block_file(0)).read_bytes())
    assert written[0] == written[1]


def test_a_weight_beyond_float16_is_refused_where_it_is_computed_in_that(tiny_checkpoint, tmp_path) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("llama", "bfloat16", blocks=1), source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 70000.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        Refusal, match=r"model.layers.0.mlp.up_proj.weight: a weight of 70144, .* --compute bf16 or fp32"
    ):
        make_shards(source, tmp_path, 1, LENGTH, blocks=1, compute="fp16")
    make_shards(source, tmp_path, 1, LENGTH, blocks=1, compute="fp32")


def test_parts_that_transformers_keeps_in_float32_are_kept(tiny_checkpoint) -> None:
    model = empty_model(read_config(tiny_checkpoint("llama", "bfloat16")), torch.bfloat16)
    model._keep_in_fp32_modules_strict = {"input_layernorm"}
    model._keep_in_fp32_modules = {"q_proj"}  # in float16 only
    noted = note_dtypes(model, torch.bfloat16)
    wide = {name for name, dtype in noted.items() if dtype == torch.float32}
    assert wide == {f"model.layers.{index}.input_layernorm.weight" for index in range(4)}
    layer = model.model.layers[0].to_empty(device="cpu").to(torch.bfloat16)
    with computing(layer):
        assert layer.input_layernorm.weight.dtype == torch.float32
        assert layer.self_attn.q_proj.weight.dtype == torch.bfloat16
    assert layer.input_layernorm.weight.dtype == torch.bfloat16


def test_casts_are_there_within_and_gone_after_even_if_it_fails() -> None:
    module = nn.Linear(3, 2).to(torch.bfloat16)
    module.__dict__["computed"] = {"weight": torch.float32, "bias": torch.bfloat16}
    weight, bias = module.weight, module.bias
    with computing(module), computing(module):
        assert module.weight.dtype == torch.float32 and module.bias is bias
    assert module.weight is weight
    with pytest.raises(ZeroDivisionError), computing(module):
        _ = 1 // 0
    assert module.weight is weight and module.bias is bias


def test_auto_is_the_weights_own_dtype_where_there_are_units_for_it() -> None:
    assert [chosen_compute(dtype, True) for dtype in COMPUTED.values()] == ["fp32", "bf16", "fp16"]
    assert {chosen_compute(dtype, False) for dtype in COMPUTED.values()} == {"fp32"}
    assert chosen_compute(torch.float64, True) == "fp32"


def test_the_weights_dtype_is_that_of_most_of_them(tiny_checkpoint, tmp_path) -> None:
    source = mixed_checkpoint(tiny_checkpoint("qwen3", blocks=2), tmp_path / "model", norms_wide, None)
    config, checkpoint = read_config(source), Checkpoint(source)
    assert weights_dtype(config, "auto", checkpoint) == torch.bfloat16
    assert weights_dtype(config) == torch.float32  # nothing to go by
    assert weights_dtype(config, "float16", checkpoint) == torch.float16


@pytest.mark.parametrize(
    ("dtype", "capabilities", "seen_by_onednn", "units"),
    [
        (torch.float32, {}, False, True),
        (torch.bfloat16, {"amx_bf16": True}, True, True),
        (torch.bfloat16, {"avx512_bf16": True}, True, True),
        (torch.bfloat16, {"avx512_bf16": True}, False, False),
        (torch.bfloat16, {"avx2": True}, True, False),
        (torch.float16, {"avx512_bf16": True}, True, False),
        (torch.float16, {"avx512_fp16": True}, True, True),
        (torch.float64, {"amx_bf16": True}, True, False),
    ],
)
def test_units_are_those_of_the_processor_that_onednn_may_use(
    monkeypatch, dtype, capabilities, seen_by_onednn, units
) -> None:
    monkeypatch.setattr(devices.torch.cpu, "get_capabilities", lambda: capabilities)
    seen = SimpleNamespace(**{f"_is_mkldnn_{name}_supported": lambda: seen_by_onednn for name in ("bf16", "fp16")})
    monkeypatch.setattr(devices.torch.ops, "mkldnn", seen)
    assert devices.has_units(dtype, "cpu") is units
