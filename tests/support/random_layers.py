"""Random layers that tests of solvers share: inputs whose channels depend on each other, and weights."""

import torch
from torch import Tensor


def correlated(tokens: int, inputs: int, seed: int = 0, mixed: float = 1.0) -> Tensor:
    """Inputs (tokens, I) float64 whose channels depend on each other, the more the more they are `mixed`, and differ in
    size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64)
    return (x + mixed * x @ mixing) * torch.linspace(0.3, 3, inputs, dtype=torch.float64)


def weight_of(outputs: int, inputs: int, seed: int = 0) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1000 + seed))
