"""What families have of their own, and the anatomy of one decoder block found by running it once.

Where blocks are and what their components are called is found in the model (`stages.structure`); a row says what is
not. How a block calls its components, which norm belongs to which, and which linears read the same tensor is not
written down: `trace` watches one forward pass.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stages.errors import Refusal
from stages.experts import stacks_of, stored_transposed


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockLayout:
    """Where a family keeps things. Paths are module names, as in `state_dict()`; all but `blocks` inside a block."""

    blocks: str = "model.layers"
    components: tuple[str, ...] = ("self_attn", "mlp")
    chains: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # a component that is no module: its children
    routers: tuple[str, ...] = ()  # choose and weigh the experts: neither pruned nor fitted
    packed: bool = False  # the patches of all images are one sequence, and blocks are called with (patches, width)
    vision: "BlockLayout | None" = None  # where the vision tower of a model that reads images too keeps its things

    @property
    def images(self) -> bool:
        """Whether the family reads images too."""
        return self.vision is not None

    def parts(self, component: str) -> tuple[str, ...]:
        """The children of the block that are the component: itself, if it is a module."""
        return self.chains.get(component, (component,))


_ENCODER = BlockLayout(blocks="model.vision_tower.encoder.layers")  # CLIP and SigLIP
_IMAGES = BlockLayout(blocks="model.language_model.layers", vision=_ENCODER)

FAMILIES: dict[str, BlockLayout] = {  # what `stages.structure` would not find
    "gemma3": _IMAGES,
    "llava": _IMAGES,
    "opt": BlockLayout(blocks="model.decoder.layers", chains={"mlp": ("fc1", "activation_fn", "fc2")}),
    "qwen2_vl": BlockLayout(
        blocks="model.language_model.layers",
        vision=BlockLayout(blocks="model.visual.blocks", components=("attn", "mlp"), packed=True),
    ),
}


def sees_images(family: str) -> bool:
    """Whether models of the family read images too, as far as is known here."""
    return family in FAMILIES and FAMILIES[family].images


def vision_of(family: str) -> BlockLayout:
    """Where the family's vision tower keeps its things. Raises Refusal for one that has none, as far as known here."""
    vision = FAMILIES[family].vision if family in FAMILIES else None
    if vision is None:
        seeing = ", ".join(name for name, other in sorted(FAMILIES.items()) if other.images)
        raise Refusal(f"tower vision: {family} reads text only; leave --tower out, or give a model that sees: {seeing}")
    return vision


@dataclass(frozen=True, slots=True)
class Call:
    """How a module was called, its hidden states left out: `run` puts others in their place."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str | None  # the keyword that carried the hidden states; None: first positional
    packed: bool = field(default=False, kw_only=True)  # the module takes all samples' positions as one sequence

    def run(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """The module's (first) output on `hidden` (samples, length, width)."""
        given = hidden.flatten(0, 1) if self.packed else hidden
        if self.keyword is None:
            output = first(module(given, *self.args, **self.kwargs))
        else:
            output = first(module(*self.args, **{**self.kwargs, self.keyword: given}))
        return output if output.ndim == hidden.ndim else output.unflatten(0, hidden.shape[:2])

    def at(self, samples: Sequence[int]) -> "Call":
        """The call for those samples of the calibration: here, the same for all (see stages.varying)."""
        return self

    def to(self, dtype: torch.dtype) -> "Call":
        """The same call with its floating-point tensors (rotary tables, additive masks) in `dtype`."""
        return replace(self, args=_cast(self.args, dtype), kwargs=_cast(self.kwargs, dtype))

    @classmethod
    def seen(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Call":
        if args:
            return cls(args[1:], dict(kwargs), None)
        keyword = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        return cls((), {name: value for name, value in kwargs.items() if name != keyword}, keyword)

    @staticmethod
    def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if args:
            return args[0]
        return kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(kwargs.values()))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value


def first(output: Any) -> Tensor:
    """A module's hidden states: its output, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


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
    shared_inputs: list[tuple[Weight, ...]]  # weights that read the very same tensor
    calls: dict[str, Call]  # how the block called each component

    @property
    def weights(self) -> tuple[Weight, ...]:
        return tuple(weight for unit in self.units for weight in unit.weights)


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


def _within(module: str, parts: Sequence[str]) -> bool:
    return any(module == part or module.startswith(f"{part}.") for part in parts)


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
    calls: dict[str, Call] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs[name], outputs[name] = Call.hidden_of(args, kwargs), first(output)
            calls[name] = Call.seen(args, kwargs)

        return hook

    components = prunable(block, layout)
    parts = {name: layout.parts(name) for name in components}
    inner = {part for chain in parts.values() for part in chain}
    norms = [name for name, child in block.named_children() if name not in inner and not isinstance(child, nn.Dropout)]
    plain = [weight for members in components.values() for weight in members if weight.expert is None]
    with ExitStack() as hooks, torch.no_grad():
        for name in dict.fromkeys([*norms, *inner, *(weight.module for weight in plain)]):
            handle = block.get_submodule(name).register_forward_hook(record(name), with_kwargs=True)
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
        before = [norm for norm in norms if alone and norm in outputs and outputs[norm] is entry]
        after = [norm for norm in norms if norm in inputs and inputs[norm] is exit_]
        frozen = tuple(router for router in layout.routers if router.startswith(f"{name}."))
        chain = layout.chains.get(name, ())
        units.append(Unit(name, next(iter(before), None), next(iter(after), None), weights, chain, frozen))
    for unit in units:
        stream = inputs[unit.modules[0]]
        unit.parallel = any(inputs[other.modules[0]] is stream for other in units if other is not unit)
    groups: dict[object, list[Weight]] = {}
    for weight in (weight for unit in units for weight in unit.weights):
        groups.setdefault(id(inputs[weight.module]) if weight.expert is None else weight.name, []).append(weight)
    return Anatomy(units, [tuple(group) for group in groups.values()], {u.name: calls[u.parts[0]] for u in units})
