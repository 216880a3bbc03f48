"""Watching a block's forward passes: what its weights read, what its units read and gave.

The passes compute what they always do. Whatever the block does inside (OPT flattens samples, experts gather tokens),
activations are handed on as (samples, tokens, channels).
Letters: T = tokens, K = experts a token goes to, I = input channels.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stages.blocks import Anatomy, Call, Unit, Weight, first

SeenInput = Callable[[tuple[Weight, ...], Tensor], None]
SeenUnit = Callable[[Unit, Tensor], None]


@contextmanager
def observing(
    block: nn.Module,
    anatomy: Anatomy,
    weights: SeenInput,
    unit_inputs: SeenUnit | None = None,
    unit_outputs: SeenUnit | None = None,
) -> Iterator[None]:
    """Within it, each forward pass of `block` calls `weights(group, x)` for every tensor that weights read, and
    `unit_inputs(unit, x)` and `unit_outputs(unit, y)` for every unit.

    An expert's x is the tokens that it got, one call a sample: (1, tokens, channels); no call where it got none.
    """
    shape = [1, 1]  # (samples, tokens) of the pass under way

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shape[:] = Call.hidden_of(args, kwargs).shape[:2]

    def by_sample(x: Tensor) -> Tensor:
        return x.view(*shape, x.shape[-1])

    def read(group: tuple[Weight, ...]) -> Callable[..., None]:
        return lambda module, args: weights(group, by_sample(args[0]))

    def entered(unit: Unit, see: SeenUnit) -> Callable[..., None]:
        return lambda module, args, kwargs: see(unit, by_sample(Call.hidden_of(args, kwargs)))

    def left(unit: Unit, see: SeenUnit) -> Callable[..., None]:
        return lambda module, args, output: see(unit, by_sample(first(output)))

    stacks: dict[str, list[Weight]] = {}
    with ExitStack() as hooks:
        hooks.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
        for group in anatomy.shared_inputs:
            if group[0].expert is not None:
                stacks.setdefault(group[0].module, []).append(group[0])
                continue
            module = block.get_submodule(group[0].module)
            hooks.callback(module.register_forward_pre_hook(read(group)).remove)
        for name, experts in stacks.items():
            hook = _routed(experts, shape, weights)
            hooks.callback(block.get_submodule(name).register_forward_pre_hook(hook).remove)
        for unit in anatomy.units:
            if unit_inputs is not None:
                entry = block.get_submodule(unit.modules[0])
                hooks.callback(entry.register_forward_pre_hook(entered(unit, unit_inputs), with_kwargs=True).remove)
            if unit_outputs is not None:
                exit_ = block.get_submodule(unit.modules[-1])
                hooks.callback(exit_.register_forward_hook(left(unit, unit_outputs)).remove)
        yield


def _routed(experts: list[Weight], shape: list[int], weights: SeenInput) -> Callable[..., None]:
    """A hook that hands each expert's weights the tokens routed to it, and its down projection what it makes of them.

    The first projection is computed once more for that: the fused kernels that run the experts show nothing inside.
    """
    by_expert: dict[int, dict[str, Weight]] = {}
    for weight in experts:
        assert weight.expert is not None
        by_expert.setdefault(weight.expert, {})[weight.parameter.rpartition(".")[2]] = weight

    def hook(module: Any, args: tuple[Tensor, ...]) -> None:
        tokens_TI, chosen_TK = args[0].reshape(-1, args[0].shape[-1]), args[1].reshape(-1, args[1].shape[-1])
        for expert, members in by_expert.items():
            routed = (chosen_TK == expert).any(-1).nonzero()[:, 0]
            if not len(routed):
                continue
            counts = torch.bincount(routed // shape[1], minlength=shape[0]).tolist()
            x_TI = tokens_TI[routed]
            inner_TI = module._apply_gate(nn.functional.linear(x_TI, module.gate_up_proj[expert]))
            for name, rows_TI in (("gate_up_proj", x_TI), ("down_proj", inner_TI)):
                for part_TI in rows_TI.split(counts):
                    if len(part_TI):
                        weights((members[name],), part_TI[None])

    return hook
