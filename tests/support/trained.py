"""Weights that were trained, with the statistics of what they read: the bundled model on Python's own sources."""

import argparse
import functools
import inspect
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import espalier.pipeline.demo
from espalier.stages.statistics import InputStatistics

BUNDLED = Path(espalier.pipeline.demo.__file__).parent / "model"
SAMPLES, LENGTH = 40, 256
Layers = dict[str, tuple[Tensor, InputStatistics]]


@functools.cache
def layers(model: Path = BUNDLED, block: int = 1) -> Layers:
    """Linear name -> weight (O, I) float32 and its inputs' statistics, Gram matrix included, of one block."""
    tokens = AutoTokenizer.from_pretrained(model)(inspect.getsource(argparse))["input_ids"]
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found: Layers = {}
    for name, module in network.model.layers[block].named_modules():
        if isinstance(module, nn.Linear):
            found[name] = (module.weight.detach().clone(), InputStatistics(module.in_features, hessian=True))
            module.register_forward_pre_hook(lambda _, args, seen=found[name][1]: seen.update(args[0]))
    with torch.no_grad():
        network(torch.tensor(tokens[: SAMPLES * LENGTH]).view(SAMPLES, LENGTH))
    return found


def error(weight: Tensor, keep: Tensor, statistics: InputStatistics) -> Tensor:
    """‖X (W − W̃)ᵀ‖² of each output row, (O,) float64: rᵀ G r."""
    gone = weight.double() * ~keep
    return ((gone @ statistics.gram.double()) * gone).sum(1)
