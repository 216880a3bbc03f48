"""Every family in the table: its anatomy is found by watching, it prunes to the exact ratio, transformers loads it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from streaming import GENTLE, make_shards, prune
from transformers import AutoConfig, AutoModelForCausalLM

from stages.blocks import FAMILIES, Anatomy, Weight, layout_of, prunable, trace
from stages.errors import Refusal
from stages.recipe import Recipe
from stages.shard import block_file
from stages.skeleton import Skeleton, read_config

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LENGTH = 16


def anatomy_of(directory) -> Anatomy:
    skeleton = Skeleton(read_config(directory), torch.float32)
    tensors = load_file(directory / "model.safetensors")
    block = skeleton.assembled(1, {inside: tensors[outside] for inside, outside in skeleton.block_tensors(1).items()})
    call, hidden = skeleton.calls(1, 4)[1], torch.zeros(1, 4, skeleton.hidden_size)
    return trace(block, lambda: call.run(block, hidden), skeleton.layout)


def names(weights: tuple[Weight, ...]) -> tuple[str, ...]:
    return tuple(weight.name for weight in weights)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_units_norms_and_shared_inputs_are_found(tiny_checkpoint, family) -> None:
    anatomy = anatomy_of(tiny_checkpoint(family))
    attention, mlp = anatomy.units
    assert (attention.name, attention.before, attention.after) == ("self_attn", "input_layernorm", None)
    assert (mlp.name, mlp.before, mlp.after) == ("mlp", "post_attention_layernorm", None)
    assert tuple(names(unit.weights) for unit in anatomy.units) == (ATTENTION, MLP)
    assert attention.modules == ("input_layernorm", "self_attn")
    assert [names(group) for group in anatomy.shared_inputs] == [ATTENTION[:3], ATTENTION[3:], MLP[:2], MLP[2:]]
    assert set(anatomy.calls) == {"self_attn", "mlp"}


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", "bfloat16"), ("mistral", "float32"), ("qwen2", "bfloat16"), ("qwen3", "float32")]
)
def test_a_pruned_family_has_its_exact_ratio_and_loads_in_transformers(
    tiny_checkpoint, tiny_tokens, tmp_path, family, dtype
) -> None:
    directory = tiny_checkpoint(family, dtype, blocks=2)
    shard = make_shards(directory, tmp_path, 1, LENGTH, blocks=2, recipe=Recipe(sparsity=0.3, learning_rate=GENTLE))[0]
    reports = prune([shard], tiny_tokens(16, LENGTH), blocks=2)
    dense, pruned = load_file(directory / "model.safetensors"), {}
    for index in range(2):
        pruned |= load_file(tmp_path / "output" / block_file(index))
    assert set(pruned) == {name for name in dense if ".layers." in name}
    for name, tensor in pruned.items():
        assert (tensor.dtype, tensor.shape) == (dense[name].dtype, dense[name].shape)
        if name.endswith("_proj.weight"):
            assert ((tensor == 0).sum(-1) == int(tensor.shape[-1] * 0.3)).all(), name
    units = [unit for report in reports for unit in report["units"]]
    better = sum(unit["error_after"] < unit["error_before"] for unit in units)
    assert all(unit["error_after"] <= unit["error_before"] for unit in units)
    assert better >= 3, f"only {better} of {len(units)} units were fitted better"
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=getattr(torch, dtype))
    model.load_state_dict(dense | pruned, strict=True)
    assert model(input_ids=tiny_tokens(1, LENGTH).long()).logits.isfinite().all()


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_norms_and_biases_take_part_in_the_fit(tiny_checkpoint, tiny_tokens, tmp_path, family) -> None:
    directory = tiny_checkpoint(family)
    shard = make_shards(directory, tmp_path, 4, LENGTH, recipe=Recipe(learning_rate=GENTLE))[0]  # the first block alone
    report = prune([shard], tiny_tokens(16, LENGTH))[0]
    assert all(unit["improved"] for unit in report["units"])
    dense, pruned = load_file(directory / "model.safetensors"), load_file(tmp_path / "output" / block_file(0))
    vectors = [name for name, tensor in pruned.items() if tensor.dim() == 1]
    assert len(vectors) == (5 if family == "qwen2" else 2)
    for name in vectors:
        if not name.endswith("k_proj.bias"):  # a bias of the keys shifts all scores of a query alike, but for rotation
            assert not torch.equal(pruned[name], dense[name]), f"{name} did not move"


def test_an_unknown_family_is_refused_and_the_known_ones_are_named(tmp_path) -> None:
    with pytest.raises(Refusal, match=r"'bloom' is not supported; supported: llama, mistral, qwen2, qwen3\..*FAMILIES"):
        layout_of("bloom")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_neox", "hidden_size": 8}))
    with pytest.raises(Refusal, match="'gpt_neox' is not supported"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(Refusal, match="'' is not supported"):
        read_config(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_an_unreadable_config_is_refused(tmp_path, text) -> None:
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(Refusal, match=r"config\.json: cannot be read"):
        read_config(tmp_path)


def test_a_quantised_checkpoint_is_refused(tiny_checkpoint, tmp_path) -> None:
    config = json.loads((tiny_checkpoint() / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refusal, match="quantised by fp8"):
        read_config(tmp_path)


def test_a_linear_outside_the_components_is_refused() -> None:
    block = torch.nn.Module()
    block.self_attn = torch.nn.Module()
    block.self_attn.q_proj = torch.nn.Linear(4, 4)
    block.adapter = torch.nn.Linear(4, 4)
    with pytest.raises(Refusal, match=r"\['adapter'\] lie in no known component"):
        prunable(block, layout_of("llama"))
    with pytest.raises(Refusal, match="no known component"):
        prunable(torch.nn.Module(), layout_of("llama"))


def test_the_skeleton_takes_no_memory_for_weights(tiny_checkpoint) -> None:
    skeleton = Skeleton(read_config(tiny_checkpoint("qwen3")), torch.bfloat16)
    assert all(p.is_meta for layer in skeleton.layers for p in layer.parameters())
    assert sum(p.untyped_storage().nbytes() for p in skeleton.model.parameters()) < 100
    assert (skeleton.hidden_size, skeleton.vocabulary, len(skeleton.layers)) == (32, 128, 4)
