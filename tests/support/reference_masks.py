"""Masks that the reference implementations gave, with the weights and inputs they were made from (shared/oracles)."""

import numpy as np
import torch

from espalier.stages.statistics import InputStatistics

PATTERNS = {
    "unstructured50": {"sparsity": 0.5},
    "unstructured60": {"sparsity": 0.6},
    "2of4": {"pattern": (2, 4)},
    "4of8": {"pattern": (4, 8)},
}
LINEARS = {"q_proj": "self_attn.q_proj", "fc": "mlp.fc"}
ALLOWED = 1e-4  # near-ties, whose order hangs on the order of summation


def part_of(oracle, linear: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, InputStatistics]:
    """The dense weight and its statistics, gathered three samples at a time."""
    weight = next(tensor for name, tensor in oracle.items() if name in (f"dense.{linear}", f"dense.{LINEARS[linear]}"))
    x = oracle[f"x.{linear}"]
    statistics = InputStatistics(x.shape[-1])
    for part in x.split(3):
        statistics.update(part.to(dtype))
    return weight, statistics


def reference_keep(oracle, method: str, pattern: str, linear: str) -> torch.Tensor:
    names = [f"{method}.{pattern}.{name}.keep_bits" for name in (linear, LINEARS[linear])]
    bits = next(oracle[name] for name in names if name in oracle)
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=1).astype(bool))
