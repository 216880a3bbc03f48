"""The anatomy of one decoder block, found by running it once: units, norms, weights that read one tensor."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from espalier.stages.errors import Refusal
from espalier.stages.model.calls import Call, first
from espalier.stages.model.experts import stacks_of, stored_transposed
from espalier.stages.model.families import BlockLayout, _within
from espalier.stages.model.packing import PackedCall, inner_call, passage_of


@dataclass(frozen=True, slots=True)
class Weight:
    """One prunable matrix of a block, seen as (O, I) however it is stored."""

    name: str  # as reports and overrides call it: "self_attn.q_proj", "mlp.experts.3.down_proj"
    parameter: str  # its tensor in the block's state dict
    module: str  # the module that reads the input
    expert: int | None = None  # its place in a tensor that stacks the experts, (E, O, I)
    transposed: bool = False  # stored (I, O), as GPT-2's Conv1D does

    def of(self, tensor: Tensor) -> Tensor:
        """The (O, I) view of the stored tensor, or of anything of its shape."""
        matrix = tensor if self.expert is None else tensor[self.expert]
        return matrix.T if self.transposed else matrix


@dataclass(frozen=True, slots=True)
class Closing:
    """The matrix that a component ends with: what it gives is the component's output as it is.

    `beside`: what the component gives with it, all None; None if it gives that tensor alone.
    """

    component: str
    weight: Weight
    beside: tuple[None, ...] | None

    def comes_after(self, name: str) -> bool:
        """Whether that weight is another one of the component."""
        return name != self.weight.name and name.startswith(f"{self.component}.")

    def output(self, block: nn.Module, x: Tensor) -> Any:
        """What the component gives when the matrix reads `x`."""
        given = block.get_submodule(self.weight.module)(x)
        return given if self.beside is None else (given, *self.beside)


@dataclass(slots=True)
class Unit:
    """One component with the norms that belong to it, as module names relative to the block."""

    name: str
    before: str | None = None  # the norm whose output is the component's input
    after: str | None = None  # the norm whose input is the component's output
    weights: tuple[Weight, ...] = ()
    chain: tuple[str, ...] = ()  # the children that are the component, where it is no module of its own
    frozen: tuple[str, ...] = ()  # modules inside that are not fitted
    parallel: bool = False  # reads the same residual stream as another component: neither sees the other's output
    adds: bool = True  # what it gives is as wide as what it reads, and is added to the stream
    closing: Closing | None = None  # where the component is one module, with no more to it behind its last matrix

    @property
    def parts(self) -> tuple[str, ...]:
        """The modules that are the component, its norms left out."""
        return self.chain or (self.name,)

    @property
    def modules(self) -> tuple[str, ...]:
        """The unit's modules in the order data passes them."""
        return tuple(name for name in (self.before, *self.parts, self.after) if name)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The stored tensors that hold its weights."""
        return tuple(dict.fromkeys(weight.parameter for weight in self.weights))


@dataclass(slots=True)
class Anatomy:
    """What `trace` found in one block."""

    units: list[Unit]
    shared_inputs: list[tuple[Weight, ...]]  # weights that read the very same tensor, as data passes; experts' last
    calls: dict[str, Call]  # how the block called each component
    hidden: int | None = None  # how many columns of what the block gives are hidden states; None: all
    opens: bool = True  # the first component reads what the block is given

    @property
    def weights(self) -> tuple[Weight, ...]:
        return tuple(weight for unit in self.units for weight in unit.weights)

    def reading_alike(self, names: Collection[str]) -> list[tuple[Weight, ...]]:
        """Of `shared_inputs` the weights of those names: a tensor can be read by several components."""
        groups = [tuple(weight for weight in group if weight.name in names) for group in self.shared_inputs]
        return [group for group in groups if group]


def prunable(block: nn.Module, layout: BlockLayout) -> dict[str, tuple[Weight, ...]]:
    """Component name -> its prunable weights. Works on the meta device.

    Raises Refusal if the block holds a linear outside its components: the family's row would be wrong.
    """
    found: dict[str, tuple[Weight, ...]] = {}
    weights = [weight for name, module in block.named_modules() for weight in _weights_of(name, module)]
    weights = [weight for weight in weights if not _within(weight.module, layout.routers)]
    for component in layout.components:
        parts = layout.parts(component)
        inside = tuple(weight for weight in weights if _within(weight.module, parts))
        if inside:
            found[component] = inside
    stray = {weight.name for weight in weights} - {weight.name for inside in found.values() for weight in inside}
    if stray or not found:
        raise Refusal(f"block of {type(block).__name__}: linears {sorted(stray)} lie in no known component")
    return found


def prunable_names(module: nn.Module) -> Iterator[str]:
    """The parameters inside a module that hold prunable matrices, routers' among them."""
    for name, inside in module.named_modules():
        yield from dict.fromkeys(weight.parameter for weight in _weights_of(name, inside))


def _weights_of(name: str, module: nn.Module) -> list[Weight]:
    if isinstance(module, nn.Linear | Conv1D):
        return [Weight(name, f"{name}.weight", name, transposed=isinstance(module, Conv1D))]
    stacks = stacks_of(module)
    turned = bool(stacks) and stored_transposed(module)
    return [
        Weight(f"{name}.{expert}.{inside}", f"{name}.{inside}", name, expert, turned)
        for expert in range(max(map(len, stacks.values()), default=0))
        for inside in stacks
    ]


def trace(block: nn.Module, run: Callable[[], object], layout: BlockLayout) -> Anatomy:
    """The block's units and shared inputs, from watching one forward pass `run` (a few tokens are enough).

    A norm whose output *is* a component's input belongs to it, as does one whose input *is* its output. One that
    feeds two components belongs to neither: fitted for the one, it would be wrong for the other.
    """
    inputs: dict[str, Tensor] = {}  # holding the tensors keeps their identity unique during the pass
    outputs: dict[str, Tensor] = {}
    beside: dict[str, tuple[Any, ...] | None] = {}
    calls: dict[str, Call] = {}
    entered: list[Tensor] = []  # what the block is given

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs[name], outputs[name] = Call.hidden_of(args, kwargs), first(output)
            beside[name] = tuple(output[1:]) if isinstance(output, tuple | list) else None
            calls[name] = inner_call(passage, Call.seen(args, kwargs), inputs[name])

        return hook

    components, passage = prunable(block, layout), passage_of(block)
    parts = {name: layout.parts(name) for name in components}
    inner = {part for chain in parts.values() for part in chain}
    norms = [name for name, child in block.named_children() if name not in inner and not isinstance(child, nn.Dropout)]
    plain = [weight for members in components.values() for weight in members if weight.expert is None]
    with ExitStack() as hooks, torch.no_grad():
        for name in dict.fromkeys([*norms, *inner, *(weight.module for weight in plain)]):
            handle = block.get_submodule(name).register_forward_hook(record(name), with_kwargs=True)
            hooks.callback(handle.remove)
        handle = block.register_forward_pre_hook(
            lambda _, *given: entered.append(Call.hidden_of(*given)), with_kwargs=True
        )
        hooks.callback(handle.remove)
        run()
    units = []
    passed = list(calls)
    for name in (*inner, *(weight.module for weight in plain)):
        if name not in calls:
            raise Refusal(f"block of {type(block).__name__}: {name} holds weights and is never called as a whole")
    components = dict(sorted(components.items(), key=lambda item: passed.index(parts[item[0]][0])))
    entries = [inputs[parts[name][0]] for name in components]
    for (name, weights), entry in zip(components.items(), entries, strict=True):
        exit_, alone = outputs[parts[name][-1]], sum(other is entry for other in entries) == 1
        call = calls[parts[name][0]]
        alone = alone and not (isinstance(call, PackedCall) and call.more)  # a norm knows hidden states only
        before = [norm for norm in norms if alone and norm in outputs and outputs[norm] is entry]
        after = [norm for norm in norms if norm in inputs and inputs[norm] is exit_]
        frozen = tuple(router for router in layout.routers if router.startswith(f"{name}."))
        chain = layout.chains.get(name, ())
        units.append(Unit(name, next(iter(before), None), next(iter(after), None), weights, chain, frozen))
        last = next((weight for weight in weights if weight.expert is None and outputs[weight.module] is exit_), None)
        plain_call = (
            passage is None and not chain and exit_.ndim == 3 and all(one is None for one in beside[name] or ())
        )
        if last is not None and plain_call and inputs[last.module].ndim == 3:
            units[-1].closing = Closing(name, last, beside[name])
    for unit in units:
        stream = inputs[unit.modules[0]]
        unit.parallel = any(inputs[other.modules[0]] is stream for other in units if other is not unit)
        unit.adds = outputs[unit.modules[-1]].shape[-1] == stream.shape[-1]
    groups: dict[object, list[Weight]] = {}
    for weight in (weight for unit in units for weight in unit.weights):
        groups.setdefault(id(inputs[weight.module]) if weight.expert is None else weight.name, []).append(weight)
    order = {name: place for place, name in enumerate(passed)}
    shared = sorted(groups.values(), key=lambda group: order.get(group[0].module, len(order)))
    return Anatomy(
        units,
        [tuple(group) for group in shared],
        {unit.name: calls[unit.parts[0]] for unit in units},
        passage.hidden.columns if passage else None,
        opens=inputs[units[0].modules[0]] is entered[0],
    )
