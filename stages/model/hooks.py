"""Forward hooks on a block: what its weights read, what its units read and gave.

The passes compute what they always do. Whatever the block does inside (OPT flattens samples, experts gather tokens),
activations are handed on as (samples, tokens, channels).
Letters: T = tokens, I = input channels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from espalier.stages.model.anatomy import Anatomy, Weight
from espalier.stages.model.calls import Call, first
from espalier.stages.model.experts import SECOND, first_name, given_to_experts, inner

SeenInput = Callable[[tuple[Weight, ...], Tensor], None]
Seen = Callable[[Tensor], None]


@contextmanager
def activation_hooks(
    block: nn.Module,
    anatomy: Anatomy,
    weights: SeenInput | None,
    inputs: Mapping[str, Sequence[Seen]] = MappingProxyType({}),
    outputs: Mapping[str, Sequence[Seen]] = MappingProxyType({}),
    root: str = "",
) -> Iterator[None]:
    """Within it, each forward pass calls `weights(group, x)` for every tensor that weights of `anatomy` read, and for
    the modules named in `inputs` and `outputs` those functions, with what they read or gave: what the block itself, "",
    gave is its hidden states, whatever else travels on with them.

    A pass enters at the module `root` of `block` ("" is the block itself). One whose samples are packed into a single
    sequence is taken for one sample. An expert's x is the tokens that it got,
    one call a sample: (1, tokens, channels); no call where it got none.
    """
    shape = [1, 1]  # (samples, tokens) of the pass under way
    given = {unit.parts[0]: anatomy.calls[unit.name].given for unit in anatomy.units}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = Call.hidden_of(args, kwargs)
        shape[:] = hidden.shape[:2] if hidden.ndim > 2 else (1, len(hidden))

    def by_sample(x: Tensor) -> Tensor:
        return x.reshape(*shape, x.shape[-1])

    def entered(name: str, see: Seen) -> Callable[..., None]:
        read = given.get(name, Call.hidden_of)
        return lambda module, args, kwargs: see(by_sample(read(args, kwargs)))

    def left(name: str, see: Seen) -> Callable[..., None]:
        columns = None if name else anatomy.hidden
        return lambda module, args, output: see(by_sample(first(output))[..., :columns])

    with ExitStack() as hooks:
        hooks.callback(block.get_submodule(root).register_forward_pre_hook(enter, with_kwargs=True).remove)
        for module, hook in _readers(anatomy, shape, by_sample, weights) if weights else ():
            hooks.callback(block.get_submodule(module).register_forward_pre_hook(hook).remove)
        for name, see in ((name, see) for name, seers in inputs.items() for see in seers):
            entering = block.get_submodule(name).register_forward_pre_hook(entered(name, see), with_kwargs=True)
            hooks.callback(entering.remove)
        for name, see in ((name, see) for name, seers in outputs.items() for see in seers):
            hooks.callback(block.get_submodule(name).register_forward_hook(left(name, see)).remove)
        yield


def _readers(
    anatomy: Anatomy, shape: list[int], by_sample: Callable[[Tensor], Tensor], weights: SeenInput
) -> Iterator[tuple[str, Callable[..., None]]]:
    """Module -> a hook that hands on what its weights read."""

    def read(group: tuple[Weight, ...]) -> Callable[..., None]:
        return lambda module, args: weights(group, by_sample(args[0]))

    stacks: dict[str, list[Weight]] = {}
    for group in anatomy.shared_inputs:
        if group[0].expert is None:
            yield group[0].module, read(group)
        else:
            stacks.setdefault(group[0].module, []).append(group[0])
    for name, experts in stacks.items():
        yield name, _routed(experts, shape, weights)


def _routed(experts: list[Weight], shape: list[int], weights: SeenInput) -> Callable[..., None]:
    """A hook that hands each expert's weights the tokens routed to it, and its down projection what it makes of them.

    The first projection is computed once more for that: the fused kernels that run the experts show nothing inside.
    """
    by_expert: dict[int, dict[str, Weight]] = {}
    for weight in experts:
        assert weight.expert is not None
        by_expert.setdefault(weight.expert, {})[weight.parameter.rpartition(".")[2]] = weight

    def hook(module: Any, args: tuple[Tensor, ...]) -> None:
        for expert, x_TI, counts in given_to_experts(module, args, shape):
            members = by_expert[expert]
            for name, rows_TI in ((first_name(module), x_TI), (SECOND, inner(module, expert, x_TI))):
                for part_TI in rows_TI.split(counts):
                    if len(part_TI):
                        weights((members[name],), part_TI[None])

    return hook
