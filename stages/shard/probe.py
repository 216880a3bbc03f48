"""The trial of a model family that is not among those tested: a small random model of its config class is pruned, and
loaded back.

Width and depth are cut, what blocks consist of is kept. For pruning the model is streamed block by block against the
whole, its components are found, masked and reconstructed, and what is written is loaded back by transformers. All must
be exact. Training runs the whole model, so it needs less: a loss that is the next token's, all matrices found, and each
tensor loaded by itself.
"""

import functools
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig

from espalier.stages.errors import Refusal, first_line
from espalier.stages.loading.skeleton import Skeleton
from espalier.stages.model.anatomy import prunable, trace
from espalier.stages.model.calls import tensors_in
from espalier.stages.model.empty import auto_class
from espalier.stages.model.structure import layout_in
from espalier.stages.recipe import BlockTask, Recipe
from espalier.stages.shard.hidden_states import Pass
from espalier.stages.shard.shard import Shard
from espalier.stages.shard.spec import ShardSpec
from espalier.stages.storage.files import write_text
from espalier.stages.storage.hf_checkpoint import Checkpoint
from espalier.stages.training.arriving import hollow_model
from espalier.stages.training.model import without_bars

Use = Literal["prune", "train"]  # what a model of the family is wanted for
# By tests/stages/model/test_families.py, with every change.
# fmt: off
TRIED = frozenset((
    "apertus", "cohere2", "deepseek_v3", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3", "gemma3_text",
    "gemma3n_text", "gemma4_text",
    "glm4", "glm4_moe", "gpt2", "gpt_neox", "gpt_oss", "granite", "hunyuan_v1_dense", "llama",
    "llama4_text", "llava", "ministral3", "mistral", "mixtral", "nemotron", "olmo2", "olmo3", "olmoe",
    "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen2_vl", "qwen3", "qwen3_moe", "qwen3_next", "seed_oss",
    "smollm3", "stablelm", "starcoder2",
))
# fmt: on
SAMPLES, LENGTH, VOCABULARY = 4, 20, 128
SMALLEST = 256  # numbers in what is taken for a matrix
SIZES = {  # what the small model has in place of the config's own
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "intermediate_size_mlp": 96,
    "rotary_dim": 8,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 2,
    "topk_group": 1,
    "sliding_window": 6,
    "attention_chunk_size": 6,
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
}
GROUPS = ("num_key_value_heads", "kv_n_heads")  # heads of keys and values: as many times fewer as in the config
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def probe(skeleton: Skeleton, home: Path, memory: Path | None, use: Use = "prune") -> str | None:
    """Try the family of the model that `skeleton` stands for, in a folder of its own under `home`; the line to be told,
    or None where it has passed before. `memory` is a file that keeps what passed; it need not be writable. What can be
    pruned can be trained.

    Raises Refusal that says what differed.
    """
    family = skeleton.config.model_type
    try:
        small = small_config(skeleton.config, skeleton.layers)
    except Exception as error:
        raise _refusal(family, "cutting its config", error) from error
    whole = _key(family, small)
    key = whole if use == "prune" else f"{whole} {use}"
    if memory is not None and not {whole, key}.isdisjoint(_remembered(memory)):
        return None
    folder = home / "family-probe"
    folder.mkdir(parents=True)
    try:
        blocks = _go(family, small, folder, use)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if memory is not None:
        with suppress(OSError):
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_text(memory, json.dumps(sorted({*_remembered(memory), key})))
    passed = "streamed, pruned and loaded back exactly" if use == "prune" else "trained, and loaded tensor by tensor"
    return f"{family}: new here; a small random model of it, {blocks} blocks, was {passed}"


def _key(family: str, small: PreTrainedConfig) -> str:
    settings = json.dumps(small.to_dict(), sort_keys=True, default=str)
    return f"{family} {transformers.__version__} {hashlib.sha256(settings.encode()).hexdigest()}"


def _remembered(memory: Path) -> list[str]:
    try:
        return [key for key in json.loads(memory.read_text()) if isinstance(key, str)]
    except (OSError, ValueError, TypeError):
        return []


def small_config(config: PreTrainedConfig, layers: Sequence[nn.Module]) -> PreTrainedConfig:
    """The config with small widths, and as many of the first blocks as show every kind of block, two at least."""
    text = config.get_text_config()
    settings, names, depth = text.to_dict(), text.attribute_map, len(layers)
    listed = {name: value for name, value in settings.items() if isinstance(value, list) and len(value) == depth}
    placed = {name: value for name, value in settings.items() if value and _by_block(value)}
    kinds = [
        (
            tuple(layer.state_dict()),
            *(str(value[index]) for value in listed.values()),
            *(str(value.get(index, value.get(str(index)))) for value in placed.values()),
        )
        for index, layer in enumerate(layers)
    ]
    count = max(min(2, depth), *(kinds.index(kind) + 1 for kind in kinds))
    changes: dict[str, Any] = {name: value[:count] for name, value in listed.items()}
    changes |= {name: {k: v for k, v in value.items() if int(k) < count} for name, value in placed.items()}
    heads = settings.get(names.get("num_attention_heads", "num_attention_heads"))
    changes |= _smaller({**settings, **changes}, names, heads)
    changes[names.get("num_hidden_layers", "num_hidden_layers")] = count
    changes |= {name: value for name, value in SPECIAL.items() if settings.get(name) is not None}
    return type(text)(**{**settings, **changes, "dtype": "float32"})


def _by_block(value: Any) -> bool:
    """Whether a setting says something of single blocks, by their numbers."""
    return isinstance(value, dict) and all(str(key).isdigit() and isinstance(item, dict) for key, item in value.items())


def _smaller(settings: Mapping[str, Any], names: Mapping[str, str], heads: Any) -> dict[str, Any]:
    """Those settings that are to be others in a small model, and the configs inside that hold any.

    `names`: what this config calls a setting that others call otherwise. `heads`: how many the model has."""
    changes: dict[str, Any] = {}
    for name, size in SIZES.items():
        own = names.get(name, name)
        value = settings.get(own)
        if isinstance(value, int) and value > size:
            changes[own] = size
        elif isinstance(value, list) and all(isinstance(item, int) and item > size for item in value):
            changes[own] = [size] * len(value)
    for name in GROUPS:
        groups = settings.get(name)
        if isinstance(groups, int) and isinstance(heads, int) and heads > SIZES["num_attention_heads"]:
            changes[name] = max(1, SIZES["num_attention_heads"] * groups // heads)
    for name, value in settings.items():
        if isinstance(value, dict) and name.endswith("_config") and not _by_block(value):
            changes[name] = value | _smaller(value, {}, heads)
        elif isinstance(value, dict) and _by_block(value):
            changes[name] = {key: item | _smaller(item, names, heads) for key, item in value.items()}
    return changes


def _go(family: str, config: PreTrainedConfig, folder: Path, use: Use) -> int:
    """All the way once; how many blocks it was. Raises Refusal that says how far it came and what differed."""
    step = "building a small model of it"
    try:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(3, VOCABULARY, (SAMPLES, LENGTH), generator=generator)
        model = _random_model(config, generator)
        with without_bars():
            model.save_pretrained(folder / "model")
        dense = _loaded(config, folder / "model")
        whole = _states(dense, tokens)
        step = "predicting the next token"
        _looks_back(dense, tokens, whole["logits"])
        if use == "train":
            step = "training it"
            _learns(dense, tokens, whole["logits"])
            step = "looking for its matrices"
            _all_accounted(Skeleton(config, torch.float32, checkpoint=Checkpoint(folder / "model")))
            step = "loading it tensor by tensor"
            _arrives(dense, folder / "model")
            return int(config.num_hidden_layers)
        step = "streaming block by block"
        shard = _shard(folder, config.num_hidden_layers)
        _streamed(shard, tokens, whole, Pass(microbatches=1, keeps=0))
        step = "looking for its matrices"
        _all_accounted(shard.skeleton)
        step = "looking at how it calls its components"
        _all_given(shard)
        step = "pruning and reconstruction"
        for index in range(config.num_hidden_layers):
            order = BlockTask(blocks=(index,))
            shard.work(order)
            for report in shard.committed(order):
                for name, layer in report["layers"].items():
                    if 2 * layer["zeros"] != layer["weights"]:
                        raise _Differs(f"block {index}, {name}: {layer['zeros']} of {layer['weights']} are zero")
        step = "loading what was written"
        shard.copy_ends()
        shard.open((0,))
        _gather(folder)
        pruned = _states(_loaded(config, folder / "output"), tokens)
        last = _streamed(shard, tokens, pruned, Pass(microbatches=1))
        assert torch.isfinite(last).all()
    except Exception as error:
        raise _refusal(family, step, error) from error
    return int(config.num_hidden_layers)


def _refusal(family: str, step: str, error: Exception) -> Refusal:
    return Refusal(
        f"model family {family!r} is not supported: {step} failed on a small random one ({first_line(error)}); "
        "a row in FAMILIES (stages/model/families.py) may say what is different"
    )


def _looks_back(model: Any, tokens: Tensor, logits: Tensor) -> None:
    """Raises _Differs where a token sees those after it: an encoder, whose logits say nothing of the next token."""
    others = tokens.clone()
    others[:, -1] = (others[:, -1] + 1) % VOCABULARY
    moved = _states(model, others)["logits"]
    if not torch.allclose(moved[:, :-1], logits[:, :-1], rtol=1e-3, atol=1e-4):
        raise _Differs("each token sees those after it, as in an encoder")


def _learns(model: Any, tokens: Tensor, logits: Tensor) -> None:
    """Raises _Differs where the loss is not the next token's alone, or a gradient not finite."""
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    plain = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    if not torch.allclose(loss, plain, rtol=1e-5):
        raise _Differs(f"its loss is {loss.item():.6g}, and that of the next token {float(plain):.6g}")
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            raise _Differs(f"the gradient of {name} is not finite")


def _arrives(model: Any, directory: Path) -> None:
    """Raises _Differs for a tensor that is another where each is read by itself, as ranks do that share a model."""
    hollow = hollow_model(directory, torch.float32)
    if hollow is None:  # then ranks take the whole model
        return
    _, values = hollow
    for name, parameter in model.named_parameters():
        if not torch.equal(values(name), parameter):
            raise _Differs(f"{name} is another than in the whole model")


def _all_accounted(skeleton: Skeleton) -> None:
    """Raises _Differs for a matrix of a block that is neither pruned nor a router's: it would stay dense unsaid."""
    for index, layer in enumerate(skeleton.layers):
        pruned = {weight.parameter for weights in prunable(layer, skeleton.layout).values() for weight in weights}
        for name, tensor in layer.named_parameters():
            matrix = tensor.ndim > 1 and 1 not in tensor.shape and tensor.numel() >= SMALLEST
            routes = any(name.startswith(f"{router}.") for router in skeleton.layout.routers)
            if matrix and name not in pruned and not routes and not name.endswith("bias"):
                raise _Differs(f"block {index}: {name} {tuple(tensor.shape)} is no linear, expert or router known here")


def _all_given(shard: Shard) -> None:
    """Raises _Differs for a component that is given, beside its input, something that hangs on the tokens: on its own
    it could not be reconstructed."""
    generator = torch.Generator().manual_seed(1)
    for index in range(shard.spec.first, shard.spec.last):
        call, block = shard.skeleton.calls(1, LENGTH)[index], shard.blocks.hold([index])[0][index]
        found = []
        for _ in range(2):
            hidden = torch.randn(1, LENGTH, shard.skeleton.columns(index), generator=generator)
            found.append(trace(block, functools.partial(call.run, block, hidden), shard.skeleton.layout).calls)
        for name, once in found[0].items():
            again = found[1][name]
            pairs = zip(tensors_in((once.args, once.kwargs)), tensors_in((again.args, again.kwargs)), strict=True)
            if not all(torch.equal(left, right) for left, right in pairs):
                raise _Differs(f"block {index}: {name} is given more that hangs on the tokens than its input")


class _Differs(Exception):
    """Something was computed or written otherwise than transformers does."""


def _random_model(config: PreTrainedConfig, generator: torch.Generator) -> Any:
    """As transformers begins it; vectors, which it begins as ones and zeros, moved a little."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(0)
        model = auto_class(config).from_config(config, dtype=torch.float32).eval()
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and (tensor.ndim == 1 or name.endswith("_bias")):
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model


def _loaded(config: PreTrainedConfig, directory: Path) -> Any:
    with without_bars():
        model, notes = auto_class(config).from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if notes[what]:
            raise _Differs(f"{what.replace('_', ' ')}: {sorted(map(str, notes[what]))[0]}")
    return model.eval()


def _states(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """What the whole model computes: each block's output, and "logits"."""
    seen: dict[str, Tensor] = {}
    blocks = model.get_submodule(layout_in(model).blocks)

    def keep(name: str) -> Any:
        return lambda module, args, output: seen.__setitem__(name, output if isinstance(output, Tensor) else output[0])

    handles = [block.register_forward_hook(keep(f"block {index}")) for index, block in enumerate(blocks)]
    with torch.no_grad():
        seen["logits"] = model(input_ids=tokens, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return seen


def _shard(folder: Path, blocks: int) -> Shard:
    (folder / "output").mkdir()
    spec: Mapping[str, Any] = {"model": str(folder / "model"), "output": str(folder / "output"), "length": LENGTH}
    recipe = Recipe(learning_rate=0.01)
    ends: Mapping[str, Any] = {"index": 0, "first": 0, "last": blocks, "embeds": True, "heads": True}
    made = Shard(ShardSpec(scratch=str(folder), recipe=recipe, **ends, **spec))
    made.open()
    return made


def _streamed(shard: Shard, tokens: Tensor, whole: Mapping[str, Tensor], this: Pass) -> Tensor:
    """The logits by way of the shard, all samples in one microbatch. Raises _Differs where they are not the model's."""
    shard.begin(this)
    hidden, last = shard.forward(0, shard.embed(tokens.int())), shard.spec.last - 1
    if not torch.equal(shard.skeleton.unpacked(hidden), whole[f"block {last}"]):
        raise _Differs(f"block {last} gives other values than in the whole model")
    logits = shard.logits(hidden)
    if not torch.equal(logits, whole["logits"]):
        raise _Differs("the blocks agree and the logits differ")
    return logits


def _gather(folder: Path) -> None:
    """The output's files as one checkpoint."""
    files = sorted((folder / "output").glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for file in files[1:]:
        file.unlink()
    files[0].unlink()
    save_file(tensors, folder / "output" / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(folder / "model" / "config.json", folder / "output" / "config.json")
