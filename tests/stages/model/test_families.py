"""Every family, with a row or not, against transformers: streamed, pruned to the exact ratio, reconstructed, loaded
back."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from family_models import LAYERS, NAMES, auto_class, config_of, family_checkpoint, layers_of
from safetensors.torch import load_file, save_file
from streaming import GENTLE, make_shards, microbatches, prune, same_bits, stream
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3nConfig, Gemma3nForCausalLM

from espalier.stages.errors import Refusal
from espalier.stages.loading.skeleton import Skeleton, read_config
from espalier.stages.masks import keep_mask
from espalier.stages.model.anatomy import Anatomy, Weight, prunable, trace
from espalier.stages.model.empty import empty_model
from espalier.stages.model.families import FAMILIES, BlockLayout
from espalier.stages.model.hooks import activation_hooks
from espalier.stages.recipe import BlockTask, Recipe
from espalier.stages.shard.mask_selection import EXPERT_TOKENS
from espalier.stages.shard.spec import block_file
from espalier.stages.statistics import InputStatistics
from espalier.stages.storage.hf_checkpoint import Checkpoint

LENGTH = 20
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LLAMA = [("self_attn", "input_layernorm", None), ("mlp", "post_attention_layernorm", None)]
GEMMA = [
    ("self_attn", "input_layernorm", "post_attention_layernorm"),
    ("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
]
PER_LAYER = [("per_layer_input_gate", None, "act_fn"), ("per_layer_projection", None, "post_per_layer_input_norm")]
PACKED = ("gemma3n_text", "gemma4_text")  # families whose blocks hand on more than hidden states
UNITS = dict.fromkeys(NAMES, LLAMA) | {
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "gemma3_text": GEMMA,
    "gpt2": [("attn", "ln_1", None), ("mlp", "ln_2", None)],
    "gpt_neox": [("attention", "input_layernorm", None), ("mlp", "post_attention_layernorm", None)],
    "gpt_neox.serial": [("attention", "input_layernorm", None), ("mlp", "post_attention_layernorm", None)],
    "olmo2": [("self_attn", None, "post_attention_layernorm"), ("mlp", None, "post_feedforward_layernorm")],
    "opt": [("self_attn", "self_attn_layer_norm", None), ("mlp", "final_layer_norm", None)],
    "opt.post-norm": [("self_attn", None, None), ("mlp", None, None)],
    "phi": [("self_attn", None, None), ("mlp", None, None)],  # one norm feeds both: it belongs to neither
    "cohere2": [("self_attn", None, None), ("mlp", None, None)],
    "apertus": [("self_attn", "attention_layernorm", None), ("mlp", "feedforward_layernorm", None)],
    "exaone4": [("self_attn", None, "post_attention_layernorm"), ("mlp", None, "post_feedforward_layernorm")],
    "gemma3n_text": [
        ("laurel", None, None),  # reads what the attention reads: its norm belongs to neither
        ("self_attn", None, "post_attention_layernorm"),
        ("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        *PER_LAYER,
    ],
    "gemma4_text": [*GEMMA, *PER_LAYER],
    "glm4": [
        ("self_attn", "input_layernorm", "post_self_attn_layernorm"),
        ("mlp", "post_attention_layernorm", "post_mlp_layernorm"),
    ],
    "olmo3": [("self_attn", None, "post_attention_layernorm"), ("mlp", None, "post_feedforward_layernorm")],
    "llama4_text": [("self_attn", "input_layernorm", None), ("feed_forward", "post_attention_layernorm", None)],
}


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return family_checkpoint(tmp_path_factory.mktemp("families"))


def opened(directory: Path, index: int = 1) -> tuple[Skeleton, nn.Module, Anatomy]:
    checkpoint = Checkpoint(directory)
    skeleton = Skeleton(read_config(directory), torch.float32, checkpoint=checkpoint)
    block = skeleton.load_block(index, checkpoint)
    call, hidden = skeleton.calls(1, 4)[index], torch.zeros(1, 4, skeleton.columns(index))
    return skeleton, block, trace(block, lambda: call.run(block, hidden), skeleton.layout)


def names(weights: tuple[Weight, ...]) -> tuple[str, ...]:
    return tuple(weight.name for weight in weights)


def logits_of(directory: Path, dtype: str) -> Callable[[Tensor], Tensor]:
    """What transformers loads from the directory and computes."""
    auto = auto_class(AutoConfig.from_pretrained(directory))
    model, report = auto.from_pretrained(directory, dtype=getattr(torch, dtype), output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    model.eval()

    @torch.no_grad()
    def logits(tokens: Tensor) -> Tensor:
        return model(input_ids=tokens.long(), use_cache=False).logits

    return logits


def written(source: Path, output: Path) -> dict[str, Tensor]:
    """Every tensor of the output, made a checkpoint of its own as the pipeline does: config and weights."""
    files = sorted(output.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    shutil.copyfile(source / "config.json", output / "config.json")
    for file in files:
        file.unlink()
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    return tensors


def test_every_family_has_a_case() -> None:
    assert set(FAMILIES) <= {name.partition(".")[0] for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_units_and_their_norms_are_found(checkpoint_of, name) -> None:
    skeleton, _, anatomy = opened(checkpoint_of(name))
    assert bool(skeleton.passages) == (name in PACKED)
    assert [(unit.name, unit.before, unit.after) for unit in anatomy.units] == UNITS[name]
    alike = {"gpt_neox": 2, "phi": 2, "cohere2": 2, "gemma3n_text": 2}.get(name, 0)
    assert [unit.parallel for unit in anatomy.units] == [at < alike for at in range(len(anatomy.units))]
    assert set(anatomy.calls) == {unit.name for unit in anatomy.units}


def test_weights_that_read_the_same_tensor_share_it(checkpoint_of) -> None:
    def shared(name: str) -> list[tuple[str, ...]]:
        return [names(group) for group in opened(checkpoint_of(name))[2].shared_inputs]

    assert shared("llama") == [ATTENTION[:3], ATTENTION[3:], MLP[:2], MLP[2:]]
    assert ("self_attn.qkv_proj",) in shared("phi3") and len(shared("phi3")) == 4
    assert shared("opt")[2:] == [("fc1",), ("fc2",)]
    of_experts = shared("mixtral")[2:]
    assert of_experts[:2] == [("mlp.experts.0.gate_up_proj",), ("mlp.experts.0.down_proj",)] and len(of_experts) == 8


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_family_streams_as_the_whole_model_runs(checkpoint_of, tiny_tokens, tmp_path, name, dtype) -> None:
    directory, tokens = checkpoint_of(name, dtype), tiny_tokens(3, LENGTH)
    whole = logits_of(directory, dtype)
    for count, resident in ((1, "all"), (2, "one")):
        shards = make_shards(directory, tmp_path, count, LENGTH, blocks=layers_of(name), resident=resident)
        for hidden, part in zip(stream(shards, tokens), microbatches(tokens), strict=True):
            assert same_bits(shards[-1].logits(hidden), whole(part)), f"{count} shards, resident {resident}"


LEFT = ("mlp.gate.weight", "moe.gate.weight", "router.weight", "shared_expert_gate.weight", "_bias", "conv1d.weight")
LEFT += ("_coefs.weight", "modality_router.weight")


def is_prunable(name: str, tensor: Tensor) -> bool:
    return tensor.dim() > 1 and not name.endswith(LEFT)


def zeros_of_rows(name: str, family: str, tensor: Tensor, group: int) -> Tensor:
    """How many zeros each group of inputs has, for every output; 0 is a group of all inputs."""
    rows = tensor.mT if family == "gpt2" or tensor.dim() == 3 else tensor  # one tensor of experts: (E, I, O)
    return (rows == 0).reshape(*rows.shape[:-1], -1, group or rows.shape[-1]).sum(-1)


@pytest.mark.parametrize(
    ("dtype", "ratio"),
    [("float32", {"sparsity": 0.5}), ("bfloat16", {"sparsity": None, "pattern": (2, 4), "reconstruct": "none"})],
    ids=["50 %", "2:4"],
)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_a_family_is_pruned_exactly_reconstructed_and_loaded_back(
    checkpoint_of, tiny_tokens, tmp_path, name, dtype, ratio
) -> None:
    directory, tokens, blocks = checkpoint_of(name, dtype), tiny_tokens(16, LENGTH), layers_of(name)
    recipe = Recipe(**ratio, learning_rate=GENTLE)
    shard = make_shards(directory, tmp_path, 1, LENGTH, blocks=blocks, recipe=recipe)[0]
    reports = prune([shard], tokens)
    shard.copy_ends()
    shard.open((0,))
    streamed = [shard.logits(hidden) for hidden in stream([shard], tokens[:4])]

    errors = [(unit["error_before"], unit["error_after"]) for report in reports for unit in report["units"]]
    assert len(errors) == (0 if "reconstruct" in ratio else len(UNITS[name]) * blocks)
    assert all(0 < after < before for before, after in errors), errors
    dense, pruned = load_file(directory / "model.safetensors"), written(directory, tmp_path / "output")
    assert set(pruned) == set(dense)
    inside = ".h." if name == "gpt2" else "layers."
    for tensor_name, tensor in pruned.items():
        assert (tensor.dtype, tensor.shape) == (dense[tensor_name].dtype, dense[tensor_name].shape)
        if "vision" in tensor_name or "visual" in tensor_name or inside not in tensor_name:
            assert torch.equal(tensor, dense[tensor_name]), f"{tensor_name} was touched"
        elif is_prunable(tensor_name, tensor):
            group = 4 if "pattern" in ratio else tensor.shape[-2 if name == "gpt2" or tensor.dim() == 3 else -1]
            assert (zeros_of_rows(tensor_name, name, tensor, group) == group // 2).all(), tensor_name
        else:
            assert not (tensor == 0).any(), tensor_name
    assert all(report["sparsity"] == 0.5 for report in reports)
    whole = logits_of(tmp_path / "output", dtype)
    for part, ours in zip(microbatches(tokens[:4]), streamed, strict=True):
        assert same_bits(ours, whole(part))


WAYS = {
    "sparsegpt": Recipe(criterion="sparsegpt", reconstruct="none"),
    "block": Recipe(reconstruct="block", learning_rate=GENTLE),
    "window": Recipe(reconstruct="window", blocks_per_unit=2, learning_rate=GENTLE),
    "pruned inputs": Recipe(inputs="pruned", learning_rate=GENTLE),
    "sweep": Recipe(sweeps=1, learning_rate=GENTLE),
    "sweep of blocks, corrected": Recipe(sweeps=1, corrections=(0.3,), reconstruct="block", learning_rate=GENTLE),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["phi", "gemma3n_text"])
@pytest.mark.slow
def test_components_that_read_one_tensor_are_pruned_every_way(checkpoint_of, tiny_tokens, tmp_path, name, way) -> None:
    """The attention reads the very tensor that another component reads, and in Gemma 3n more than that."""
    recipe, blocks = WAYS[way], layers_of(name)
    made = make_shards(checkpoint_of(name), tmp_path, blocks // 2, LENGTH, blocks=blocks, recipe=recipe)
    reports = prune(made, tiny_tokens(16, LENGTH))
    assert all(0.5 <= report["sparsity"] < 0.505 for report in reports)  # SparseGPT's is one more a stretch of columns
    units = [unit for report in reports for unit in report["units"]]
    assert all(0 < unit["error_after"] < unit["error_before"] for unit in units)
    assert bool(units) == (recipe.reconstruct != "none")


@pytest.mark.parametrize("name", ["llama", "phi", "gemma3n_text"])
def test_a_sweep_starts_from_what_each_block_is_given(checkpoint_of, tiny_tokens, tmp_path, name) -> None:
    blocks, tokens = layers_of(name), tiny_tokens(4, LENGTH)
    (shard,) = make_shards(
        checkpoint_of(name), tmp_path, 1, LENGTH, blocks=blocks, recipe=Recipe(sweeps=1, learning_rate=GENTLE)
    )
    stream([shard], tokens, 0)
    for block in range(blocks):
        shard.work(BlockTask(blocks=(block,)))
    shard.open((None, 0))
    stream([shard], tokens, 1, streams=2)
    entered = shard.gather(BlockTask(blocks=(0,), sweep=1))[0].drifted_entry
    assert same_bits(entered.batch([0, 1]), shard.embed(tokens[:2])[:2])


BARE = {"gpt2": "transformer.", "opt": "model.", "llama": "model.", "mixtral": "model."}


@pytest.mark.parametrize("name", BARE)
def test_a_checkpoint_of_the_base_model_is_read_and_written_under_its_own_names(
    checkpoint_of, tiny_tokens, tmp_path, name
) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    source = checkpoint_of(name)
    tensors = {key.removeprefix(BARE[name]): tensor for key, tensor in load_file(source / "model.safetensors").items()}
    masks = {}
    if name == "gpt2":  # as published: with the causal mask of every layer, and the score of what it hides
        masks = {f"h.{index}.attn.bias": torch.ones(1, 1, 64, 64) for index in range(LAYERS)}
        masks |= {f"h.{index}.attn.masked_bias": torch.tensor(-torch.inf) for index in range(LAYERS)}
    save_file(tensors | masks, directory / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(source / "config.json", directory / "config.json")
    tokens, recipe = tiny_tokens(2, LENGTH), Recipe(reconstruct="none")
    shard = make_shards(directory, tmp_path, 1, LENGTH, blocks=LAYERS, recipe=recipe)[0]
    assert same_bits(shard.logits(stream([shard], tokens)[0]), logits_of(directory, "float32")(tokens))
    prune([shard], tokens)
    shard.copy_ends()
    shard.open((0,))
    ours = shard.logits(stream([shard], tokens)[0])
    result = written(directory, tmp_path / "output")
    assert set(result) == {*tensors, *masks} and all(same_bits(result[name], masks[name]) for name in masks)
    assert same_bits(ours, logits_of(tmp_path / "output", "float32")(tokens))


CUT = ("gpt2", "gpt_neox", "mixtral", "opt", "qwen2_vl", "gpt_oss", "qwen3_next", "gemma3n_text")


def test_a_gemma_that_also_sees_and_hears_is_pruned_as_the_text_model_in_it(
    checkpoint_of, tiny_tokens, tmp_path
) -> None:
    """As Gemma 3n is published: its vision tower is a timm model, which is not needed."""
    text, directory, tokens = checkpoint_of("gemma3n_text"), tmp_path / "model", tiny_tokens(4, LENGTH)
    directory.mkdir()
    tensors = load_file(text / "model.safetensors")
    inside = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    parts = ("vision_tower.timm_model.conv_stem", "audio_tower.conformer.0.norm", "embed_vision.embedding")
    beside = {f"model.{part}.weight": torch.randn(3, 5) for part in parts}
    save_file(inside | beside, directory / "model.safetensors", metadata={"format": "pt"})
    Gemma3nConfig(text_config=config_of("gemma3n_text").to_dict()).save_pretrained(directory)
    (shard,) = make_shards(directory, tmp_path, 1, LENGTH, blocks=4, recipe=Recipe(learning_rate=GENTLE))
    whole = logits_of(text, "float32")
    for hidden, part in zip(stream([shard], tokens), microbatches(tokens), strict=True):
        assert same_bits(shard.logits(hidden), whole(part))
    reports = prune([shard], tokens)
    shard.copy_ends()
    shard.open((0,))
    ours = [shard.logits(hidden) for hidden in stream([shard], tokens)]
    result = written(directory, tmp_path / "output")
    assert set(result) == {*inside, *beside} and all(same_bits(result[name], beside[name]) for name in beside)
    assert all(report["sparsity"] == 0.5 for report in reports)
    pruned = Gemma3nForCausalLM.from_pretrained(tmp_path / "output").eval()
    for logits, part in zip(ours, microbatches(tokens), strict=True):
        with torch.no_grad():
            assert same_bits(logits, pruned(input_ids=part.long(), use_cache=False).logits)


@pytest.mark.parametrize("name", CUT)
@pytest.mark.slow
def test_any_cut_of_any_family_gives_the_same_bytes(checkpoint_of, tiny_tokens, tmp_path, name) -> None:
    directory, tokens = checkpoint_of(name, "bfloat16"), tiny_tokens(9, LENGTH)
    found = set()
    for count, resident in ((1, "all"), (2, "one")):
        home = tmp_path / resident
        recipe = Recipe(learning_rate=GENTLE)
        cut = {"blocks": layers_of(name), "recipe": recipe, "resident": resident, "spool_memory": 4000}
        reports = prune(make_shards(directory, home, count, LENGTH, **cut), tokens)
        found.add(tuple(report["digest"] for report in reports))
    assert len(found) == 1


def test_what_looks_at_images_is_not_loaded(checkpoint_of) -> None:
    checkpoint = Checkpoint(checkpoint_of("llava"))
    skeleton = Skeleton(read_config(checkpoint.directory), torch.float32, checkpoint=checkpoint)
    skeleton.load_ends(checkpoint)
    for name, parameter in skeleton.model.named_parameters():
        read = name.startswith(("model.language_model.", "lm_head."))
        assert (parameter.untyped_storage().nbytes() == 4 * parameter.numel()) == read, name


def test_a_shard_with_the_head_alone_loads_no_table_that_only_embeds(checkpoint_of) -> None:
    """Gemma 3n's for each block is most of the model; the other is the head, too."""
    checkpoint = Checkpoint(checkpoint_of("gemma3n_text"))
    skeleton = Skeleton(read_config(checkpoint.directory), torch.float32, checkpoint=checkpoint)
    skeleton.load_ends(checkpoint, embedding=False)
    for name, parameter in skeleton.model.named_parameters():
        held = parameter.untyped_storage().nbytes() == 4 * parameter.numel()
        assert held == (name != "model.embed_tokens_per_layer.weight"), name


def expert_sums(block: nn.Module, routed: Tensor, expert: int) -> tuple[Tensor, Tensor, int]:
    """Σx² of an expert's two inputs and its tokens, from the component's input (tokens, hidden), by hand."""
    experts = block.mlp.experts
    chosen = block.mlp.gate(routed)[2]
    x = routed[[expert in row for row in chosen.tolist()]]
    gate, up = (x @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
    return x.double().square().sum(0), (nn.functional.silu(gate) * up).double().square().sum(0), len(x)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_an_experts_statistics_are_those_of_the_tokens_it_got(checkpoint_of, tmp_path, name) -> None:
    skeleton, block, anatomy = opened(checkpoint_of(name))
    hidden = torch.randn(5, LENGTH, skeleton.hidden_size, generator=torch.Generator().manual_seed(3))

    def gathered(parts: list[Tensor]) -> tuple[dict[str, InputStatistics], list[Tensor]]:
        sums: dict[str, InputStatistics] = {}
        seen: list[Tensor] = []

        def add(group: tuple[Weight, ...], x: Tensor) -> None:
            sums.setdefault(group[0].name, InputStatistics(x.shape[-1])).update(x)

        outputs = []
        entry = next(unit.modules[0] for unit in anatomy.units if unit.name == "mlp")
        with torch.no_grad():
            for part in parts:
                call = skeleton.calls(*part.shape[:2])[1]
                with activation_hooks(block, anatomy, add, {entry: [seen.append]}):
                    outputs.append(call.run(block, part))
                assert same_bits(outputs[-1], call.run(block, part))  # watching changes nothing
        return sums, seen

    sums, seen = gathered([hidden])
    with torch.no_grad():
        routed = block.post_attention_layernorm(seen[0]).flatten(0, 1)
        for expert in range(len(block.mlp.experts.gate_up_proj)):
            first, second, tokens = expert_sums(block, routed, expert)
            for projection, expected in (("gate_up_proj", first), ("down_proj", second)):
                statistics = sums[f"mlp.experts.{expert}.{projection}"]
                assert statistics.tokens == tokens > 0 and statistics.samples <= 5
                torch.testing.assert_close(statistics.sum_sq, expected, rtol=1e-5, atol=1e-9)
    apart, _ = gathered(list(hidden.split(2)))
    for key, statistics in sums.items():
        assert (apart[key].tokens, apart[key].samples) == (statistics.tokens, statistics.samples)
        torch.testing.assert_close(apart[key].sum_sq, statistics.sum_sq, rtol=1e-5, atol=1e-9)


def test_an_expert_with_too_few_tokens_is_pruned_by_magnitude_and_named(checkpoint_of, tiny_tokens, tmp_path) -> None:
    directory, tokens = checkpoint_of("qwen3_moe"), tiny_tokens(5, LENGTH)  # 100 tokens, 3 of 12 experts each
    shard = make_shards(directory, tmp_path, 1, LENGTH, blocks=LAYERS, recipe=Recipe(reconstruct="none"))[0]
    reports = prune([shard], tokens)
    dense, few, enough = load_file(directory / "model.safetensors"), 0, 0
    for report in reports:
        pruned = load_file(tmp_path / "output" / block_file(report["block"]))
        assert all(got < EXPERT_TOKENS for got in report["fallbacks"].values())
        for name, tensor in pruned.items():
            if ".experts." in name:
                expert = name.split(".experts.")[1].split(".")[0]
                by_magnitude = torch.equal(tensor != 0, keep_mask(dense[name].abs(), 0.5))
                fallen = [key for key in report["fallbacks"] if f".experts.{expert}." in key]
                assert len(fallen) == 2 * by_magnitude, name
                few, enough = few + bool(fallen), enough + (not fallen)
    assert few and enough


def test_a_router_is_left_as_it_was(checkpoint_of, tiny_tokens, tmp_path) -> None:
    directory = checkpoint_of("mixtral")
    shard = make_shards(directory, tmp_path, 1, LENGTH, blocks=LAYERS, recipe=Recipe(learning_rate=GENTLE))[0]
    prune([shard], tiny_tokens(16, LENGTH))
    dense = load_file(directory / "model.safetensors")
    pruned = load_file(tmp_path / "output" / block_file(0))
    router = "model.layers.0.block_sparse_moe.gate.weight"
    assert torch.equal(pruned[router], dense[router])


def test_a_missing_expert_is_refused(checkpoint_of, tmp_path) -> None:
    source = checkpoint_of("mixtral")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(source / "config.json", tmp_path / "config.json")
    with pytest.raises(Refusal, match=r"there are 3 of its kind, config\.json says 4 experts"):
        opened(tmp_path)


def test_an_expert_of_another_shape_is_refused(checkpoint_of, tmp_path) -> None:
    source = checkpoint_of("mixtral")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    tensors[name] = tensors[name][:, :8].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(source / "config.json", tmp_path / "config.json")
    with pytest.raises(Refusal, match=r"experts\.2\.w2\.weight is \(32, 8\), config\.json says \(32, 48\)"):
        opened(tmp_path)


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


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("llama9", "does not know it; install a release that does"),
        ("bert", "an encoder"),
        ("t5", "an encoder-decoder"),
        ("vit", "not of text"),
    ],
)
def test_what_is_no_decoder_of_text_is_refused(tmp_path, family, why) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "hidden_size": 8}))
    with pytest.raises(Refusal, match=rf"model family '{family}' is not supported: .*{why}") as refusal:
        read_config(tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_package_that_transformers_asks_for_is_named(monkeypatch) -> None:
    def without(*_: object, **__: object) -> None:
        raise ImportError("\nTimmWrapperModel requires the timm library.\n`pip install timm`\n")

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", without)
    with pytest.raises(Refusal) as refusal:
        empty_model(config_of("llama"), torch.float32)
    assert str(refusal.value) == "llama: TimmWrapperModel requires the timm library. `pip install timm`"


def test_a_linear_outside_the_components_is_refused() -> None:
    block = torch.nn.Module()
    block.self_attn = torch.nn.Module()
    block.self_attn.q_proj = torch.nn.Linear(4, 4)
    block.adapter = torch.nn.Linear(4, 4)
    with pytest.raises(Refusal, match=r"\['adapter'\] lie in no known component"):
        prunable(block, BlockLayout())
    with pytest.raises(Refusal, match="no known component"):
        prunable(torch.nn.Module(), BlockLayout())


def test_the_skeleton_takes_no_memory_for_weights(tiny_checkpoint) -> None:
    skeleton = Skeleton(read_config(tiny_checkpoint("qwen3")), torch.bfloat16)
    assert all(p.is_meta for layer in skeleton.layers for p in layer.parameters())
    assert sum(p.untyped_storage().nbytes() for p in skeleton.model.parameters()) < 100
    assert (skeleton.hidden_size, skeleton.vocabulary, len(skeleton.layers)) == (32, 128, 4)
