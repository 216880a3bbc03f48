"""Experts whose matrices are stacked in a few tensors of three dimensions: how they lie, and what passes through one.

Most modules of transformers store (E, O, I); gpt-oss and Llama 4 store (E, I, O), the first with biases (E, O).
Letters: E = experts, T = tokens, K = experts a token goes to, I = input channels, O = outputs, H = the block's width.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

FIRST = ("gate_up_proj", "up_proj")  # parameters of an experts' module: what makes the inner channels, and
SECOND = "down_proj"  # what they go through
STACKS = (*FIRST, SECOND)


def stacks_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's own parameters that stack experts' matrices: name -> (E, ., .)."""
    own = dict(module.named_parameters(recurse=False))
    return {name: own[name] for name in STACKS if name in own and own[name].ndim == 3}


def stored_transposed(module: nn.Module) -> bool:
    """Whether the stacks are (E, I, O): read off their shapes, as not every module says so."""
    stacks = stacks_of(module)
    if SECOND not in stacks or len(stacks) < 2:
        return bool(getattr(module, "is_transposed", False))
    first, second = next(stack.shape for name, stack in stacks.items() if name != SECOND), stacks[SECOND].shape
    as_rows, as_columns = first[2] == second[1], first[1] == second[2]  # H, if (E, O, I); H, if (E, I, O)
    return as_columns if as_rows != as_columns else bool(getattr(module, "is_transposed", False))


def first_name(module: nn.Module) -> str:
    """The parameter that an expert's tokens meet first."""
    return next(name for name in FIRST if name in stacks_of(module))


def inner(module: Any, expert: int, x_TI: Tensor) -> Tensor:
    """What an expert's down projection reads when the expert is given `x_TI`: (T, inner channels)."""
    name = first_name(module)
    matrix, bias = getattr(module, name)[expert], getattr(module, f"{name}_bias", None)
    made = x_TI @ matrix if stored_transposed(module) else nn.functional.linear(x_TI, matrix)
    if bias is not None:
        made = made + bias[expert]
    if hasattr(module, "_apply_gate") and getattr(module, "has_gate", True):
        return module._apply_gate(made)
    if name == "up_proj":
        return module.act_fn(made)
    gate, up = made.chunk(2, dim=-1)
    return up * module.act_fn(gate)


def given_to_experts(
    module: nn.Module, args: tuple[Tensor, ...], shape: Sequence[int]
) -> Iterator[tuple[int, Tensor, list[int]]]:
    """Expert by expert what it is given, (T, I), its tokens in their order, and how many of each sample they are; the
    experts that got none are left out. `shape` is the pass's (samples, tokens). The host waits for the device once.

    `args` are the module's: the tokens and the experts of each; or, where each expert is given all tokens, weighted,
    those alone, expert by expert: there the ones that it was not chosen for are zero.
    """
    given = args[0].reshape(-1, args[0].shape[-1])
    experts = len(next(iter(stacks_of(module).values())))
    if len(args) > 1:
        chosen_TK = args[1].reshape(-1, args[1].shape[-1])
        chosen = chosen_TK.reshape(-1)
        order = chosen.argsort(stable=True)
        expert, token = chosen[order], order // chosen_TK.shape[1]
        row = token
    else:
        expert, token = (given.unflatten(0, (experts, -1)) != 0).any(-1).nonzero().unbind(-1)
        row = expert * (len(given) // experts) + token
    counts_N = torch.zeros(experts * shape[0], dtype=torch.int64, device=expert.device)
    # Counted without bincount, which waits for its size.
    counts_N.scatter_add_(0, expert * shape[0] + token // shape[1], torch.ones_like(token))
    start = 0
    for number, counts in enumerate(counts_N.view(-1, shape[0]).tolist()):
        end = start + sum(counts)
        if end > start:
            yield number, given[row[start:end]], counts
        start = end
