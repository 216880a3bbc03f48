"""A tiny random checkpoint of every family, with everything that its blocks can have."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from espalier.stages.model.families import sees_images

WINDOW = 6  # of the sliding layers: shorter than the sequences that the tests run
VOCABULARY = 128
HIDDEN = 32
LAYERS = 2
VISION_LAYERS = 3

_ENDS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15}
_TEXT: dict[str, Any] = _ENDS | {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": None,
}
_MIXED = {"head_dim": 8, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": VISION_LAYERS,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}

# model_type -> the config class and what it takes; a name after a dot is a variant of the family
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _TEXT),
    "mistral": ("MistralConfig", _TEXT | {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2Config", _TEXT),
    "qwen3": ("Qwen3Config", _TEXT | _MIXED | {"use_sliding_window": True}),
    "opt": (
        "OPTConfig",
        _ENDS
        | {
            "hidden_size": HIDDEN,
            "ffn_dim": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "init_std": 0.15,
        },
    ),
    "gpt2": ("GPT2Config", _ENDS | {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXConfig", {k: v for k, v in _TEXT.items() if k != "num_key_value_heads"}),
    "gemma2": ("Gemma2Config", _TEXT | _MIXED | {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 2.0}),
    "gemma3_text": ("Gemma3TextConfig", _TEXT | _MIXED),
    "phi": ("PhiConfig", _TEXT | {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi3Config", _TEXT | {"sliding_window": WINDOW}),
    "olmo2": ("Olmo2Config", _TEXT),
    "mixtral": ("MixtralConfig", _TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        _TEXT
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | {"shared_expert_intermediate_size": 24},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        _TEXT | {"head_dim": 8, "num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 16},
    ),
}
CONFIGS["opt.post-norm"] = (
    "OPTConfig",
    CONFIGS["opt"][1] | {"do_layer_norm_before": False, "word_embed_proj_dim": 16, "activation_function": "gelu"},
)
CONFIGS["gpt_neox.serial"] = ("GPTNeoXConfig", CONFIGS["gpt_neox"][1] | {"use_parallel_residual": False})
CONFIGS["qwen3_moe.mixed"] = ("Qwen3MoeConfig", CONFIGS["qwen3_moe"][1] | {"mlp_only_layers": [0], "num_experts": 4})

_SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_HEADS = {"head_dim": 8}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DENSE_FIRST = {"first_k_dense_replace": 1, "n_shared_experts": 1, "topk_group": 1}

# Families without a row and without a name in `espalier.stages.shard.probe`: all about them is found.
FOUND: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("ApertusConfig", _TEXT),
    "cohere2": ("Cohere2Config", _TEXT | _SLIDING),
    "ernie4_5": ("Ernie4_5Config", _TEXT | _HEADS),
    "exaone4": ("Exaone4Config", _TEXT | _SLIDING),
    "gemma": ("GemmaConfig", _TEXT | _HEADS),
    "glm4": ("Glm4Config", _TEXT | _HEADS | {"attention_bias": True}),
    "granite": (
        "GraniteConfig",
        _TEXT | {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 3.0},
    ),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", _TEXT | _HEADS),
    "ministral3": ("Ministral3Config", _TEXT | _HEADS),
    "nemotron": ("NemotronConfig", _TEXT | _HEADS),
    "olmo3": ("Olmo3Config", _TEXT | _SLIDING),
    "olmoe": ("OlmoeConfig", _TEXT | {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16}),
    "seed_oss": ("SeedOssConfig", _TEXT | _HEADS),
    "smollm3": ("SmolLM3Config", _TEXT | {"no_rope_layers": [1, 0]}),
    "stablelm": ("StableLmConfig", _TEXT | {"use_qkv_bias": True, "qk_layernorm": True}),
    "starcoder2": ("Starcoder2Config", _TEXT | {"sliding_window": WINDOW}),
    "deepseek_v3": (
        "DeepseekV3Config",
        _TEXT
        | (_LATENT | _DENSE_FIRST | {"num_key_value_heads": 4, "moe_intermediate_size": 16})
        | {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 2},
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        _TEXT
        | (_HEADS | _DENSE_FIRST | {"moe_intermediate_size": 24, "use_qk_norm": True})
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1},
    ),
    "gemma3n_text": (
        "Gemma3nTextConfig",
        _TEXT
        | (_HEADS | {"num_hidden_layers": 4, "tie_word_embeddings": True})
        | {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "laurel_rank": 8}
        | {"altup_num_inputs": 3, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0], "sliding_window": WINDOW}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2},
    ),
    "gemma4_text": (
        "Gemma4TextConfig",
        _TEXT
        | (_HEADS | {"num_hidden_layers": 4, "tie_word_embeddings": True, "sliding_window": WINDOW})
        | {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
        | {"use_double_wide_mlp": True, "global_head_dim": 16},
    ),
    "gpt_oss": (
        "GptOssConfig",
        _TEXT | _MIXED | {"intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "llama4_text": (
        "Llama4TextConfig",
        _TEXT
        | (_HEADS | {"intermediate_size": 16, "intermediate_size_mlp": 48, "num_local_experts": 4})
        | {"num_experts_per_tok": 1, "moe_layers": [1], "no_rope_layers": [1, 0], "attention_chunk_size": WINDOW}
        | {"layer_types": ["chunked_attention", "full_attention"]},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        _TEXT
        | (_HEADS | _ROUTED | {"layer_types": ["linear_attention", "full_attention"]})
        | {"shared_expert_intermediate_size": 24, "linear_num_value_heads": 4, "linear_num_key_heads": 2}
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    ),
}
CONFIGS |= FOUND


def config_of(name: str) -> PreTrainedConfig:
    if name == "llava":
        vision, text = transformers.CLIPVisionConfig(**_VISION), transformers.LlamaConfig(**_TEXT)
        return transformers.LlavaConfig(
            vision_config=vision, text_config=text, image_token_id=127, tie_word_embeddings=False
        )
    if name == "gemma3":
        return transformers.Gemma3Config(
            vision_config=_VISION, text_config=_TEXT | _MIXED, mm_tokens_per_image=4, image_token_id=127
        )  # its head is tied
    if name == "qwen2_vl":
        vision = {"embed_dim": 16, "depth": VISION_LAYERS, "num_heads": 2, "hidden_size": HIDDEN, "patch_size": 8}
        vision["initializer_range"] = 0.15
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        return transformers.Qwen2VLConfig(
            vision_config=vision,
            text_config=_TEXT | {"rope_parameters": rope},
            image_token_id=127, video_token_id=126, vision_start_token_id=125, vision_end_token_id=124,
            tie_word_embeddings=False,
        )  # fmt: skip
    kind, settings = CONFIGS[name]
    return getattr(transformers, kind)(**settings)


def layers_of(name: str) -> int:
    """How many blocks the family's checkpoint has: those that show all kinds of them."""
    return config_of(name).get_text_config().num_hidden_layers


NAMES = (*CONFIGS, "gemma3", "llava", "qwen2_vl")


def auto_class(config: PreTrainedConfig) -> Any:
    return AutoModelForImageTextToText if sees_images(config.model_type) else AutoModelForCausalLM


def random_model(name: str, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    config = config_of(name)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = auto_class(config).from_config(config)
        for name, tensor in model.state_dict().items():
            if tensor.dim() == 1 or name.endswith("_bias"):  # gains all one and biases all zero would hide mistakes
                tensor.add_(torch.randn_like(tensor) * 0.1)
    model = model.to(dtype)
    model.config.dtype = dtype
    return model


def family_checkpoint(home: Path) -> Callable[[str, str], Path]:
    """make(name, dtype) -> the directory of that family's checkpoint, saved once by transformers under `home`."""

    def make(name: str, dtype: str = "float32") -> Path:
        directory = home / f"{name}-{dtype}"
        if not directory.exists():
            random_model(name, getattr(torch, dtype)).save_pretrained(directory)
        return directory

    return make
