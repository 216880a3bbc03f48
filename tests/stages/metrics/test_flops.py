"""Operations from shapes, against what torch counts while a model runs."""

import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from espalier.stages.metrics.flops import Shapes, encoder_shapes, forward_flops, shapes_of, training_flops

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


@pytest.mark.parametrize("tied", [False, True])
def test_forward_flops_are_what_torch_counts(tied: bool) -> None:
    config = transformers.LlamaConfig(
        **SMALL, intermediate_size=80, num_key_value_heads=2, tie_word_embeddings=tied, attn_implementation="eager"
    )
    model = transformers.LlamaForCausalLM(config).eval()
    tokens, length = 48, 24
    ids = torch.zeros(tokens // length, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    linears = [
        (name, *module.weight.shape) for name, module in model.model.named_modules() if isinstance(module, nn.Linear)
    ]
    shapes = shapes_of(linears, config)
    # The model computes all of the scores, of which a causal mask makes half count.
    attention = 2.0 * tokens * shapes.layers * shapes.width * length
    rotary = 2 * SMALL["hidden_size"] // SMALL["num_attention_heads"] // 2 * tokens
    assert forward_flops(shapes, tokens, length) + attention == pytest.approx(counter.get_total_flops(), abs=rotary)


def test_flops_of_a_vision_towers_blocks_are_what_torch_counts() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8, attn_implementation="eager")
    encoder = transformers.CLIPVisionModel(config).eval().encoder
    images, positions = 2, 5
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(inputs_embeds=torch.zeros(images, positions, 32))
    linears = [
        (name, *module.weight.shape) for name, module in encoder.named_modules() if isinstance(module, nn.Linear)
    ]
    counted = forward_flops(encoder_shapes(linears, 2, 32), images * positions, positions)
    assert counted == counter.get_total_flops()


def test_training_costs_three_forward_passes_and_six_operations_a_weight() -> None:
    shapes = Shapes(parameters=1000)
    assert training_flops(shapes, tokens=7, length=5) == 6 * 1000 * 7
    assert training_flops(Shapes(1000, 2, 16), 7, 5) == 3 * forward_flops(Shapes(1000, 2, 16), 7, 5)


def test_of_experts_those_count_that_a_token_is_routed_to() -> None:
    config = transformers.MixtralConfig(**SMALL, num_local_experts=8, num_experts_per_tok=2)
    matrices = [(f"model.layers.0.block_sparse_moe.experts.{n}.w1.weight", 48, 32) for n in range(8)]
    matrices += [("model.layers.0.self_attn.q_proj.weight", 32, 32)]
    head = SMALL["hidden_size"] * SMALL["vocab_size"]
    assert shapes_of(matrices, config).parameters == 2 * 48 * 32 + 32 * 32 + head
