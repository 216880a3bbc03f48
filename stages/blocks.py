"""The table of model families, and the anatomy of one decoder block found by running it once.

A family is one row: where its blocks are and what its components are called. How a block calls its components, which
norm belongs to which, and which linears read the same tensor is not written down: `trace` watches one forward pass.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stages.errors import Refusal


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockLayout:
    """Where a family keeps things. Paths are module names, as in `state_dict()`."""

    blocks: str = "model.layers"
    components: tuple[str, ...] = ("self_attn", "mlp")


FAMILIES: dict[str, BlockLayout] = {
    "llama": BlockLayout(),
    "mistral": BlockLayout(),
    "qwen2": BlockLayout(),
    "qwen3": BlockLayout(),
}


def layout_of(model_type: str) -> BlockLayout:
    """The family's row. Raises Refusal naming the supported families and how to add one."""
    if model_type not in FAMILIES:
        raise Refusal(
            f"model family {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}. "
            "To add one: a row in FAMILIES (stages/blocks.py) and a case in tests/stages/test_families.py"
        )
    return FAMILIES[model_type]


@dataclass(frozen=True, slots=True)
class Call:
    """How a module was called, its hidden states left out: `run` puts others in their place."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str | None  # the keyword that carried the hidden states; None: first positional

    def run(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """The module's (first) output on `hidden`."""
        if self.keyword is None:
            return first(module(hidden, *self.args, **self.kwargs))
        return first(module(*self.args, **{**self.kwargs, self.keyword: hidden}))

    def to(self, dtype: torch.dtype) -> "Call":
        """The same call with its floating-point tensors (rotary tables, additive masks) in `dtype`."""
        return Call(_cast(self.args, dtype), _cast(self.kwargs, dtype), self.keyword)

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


@dataclass(slots=True)
class Unit:
    """One component with the norms that belong to it, as module names relative to the block."""

    name: str
    before: str | None = None  # the norm whose output is the component's input
    after: str | None = None  # the norm whose input is the component's output
    linears: tuple[str, ...] = ()  # prunable, relative to the block

    @property
    def modules(self) -> tuple[str, ...]:
        """The unit's modules in the order data passes them."""
        return tuple(name for name in (self.before, self.name, self.after) if name)


@dataclass(slots=True)
class Anatomy:
    """What `trace` found in one block."""

    units: list[Unit]
    shared_inputs: list[tuple[str, ...]]  # linears that read the very same tensor
    calls: dict[str, Call]  # how the block called each component

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for unit in self.units for name in unit.linears)


def prunable(block: nn.Module, layout: BlockLayout) -> dict[str, tuple[str, ...]]:
    """Component name -> its prunable linears, relative to the block. Works on the meta device.

    Raises Refusal if the block holds a linear outside its components: the family's row would be wrong.
    """
    found: dict[str, tuple[str, ...]] = {}
    linears = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    for component in layout.components:
        inside = tuple(name for name in linears if name.startswith(f"{component}."))
        if inside:
            found[component] = inside
    stray = set(linears) - {name for members in found.values() for name in members}
    if stray or not found:
        raise Refusal(f"block of {type(block).__name__}: linears {sorted(stray)} lie in no known component")
    return found


def trace(block: nn.Module, run: Callable[[], object], layout: BlockLayout) -> Anatomy:
    """The block's units and shared inputs, from watching one forward pass `run` (a few tokens are enough).

    A norm whose output *is* a component's input belongs to it, as does one whose input *is* its output.
    """
    inputs: dict[str, Tensor] = {}  # holding the tensors keeps their identity unique during the pass
    outputs: dict[str, Tensor] = {}
    calls: dict[str, Call] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs[name], outputs[name] = Call.hidden_of(args, kwargs), first(output)
            if name in components:
                calls[name] = Call.seen(args, kwargs)

        return hook

    components = prunable(block, layout)
    norms = [name for name, _ in block.named_children() if name not in components]
    watched = [*norms, *components, *(name for members in components.values() for name in members)]
    with ExitStack() as hooks, torch.no_grad():
        for name in watched:
            handle = block.get_submodule(name).register_forward_hook(record(name), with_kwargs=True)
            hooks.callback(handle.remove)
        run()
    units = []
    for component, linears in components.items():
        before = [norm for norm in norms if norm in outputs and outputs[norm] is inputs[component]]
        after = [norm for norm in norms if norm in inputs and inputs[norm] is outputs[component]]
        units.append(Unit(component, next(iter(before), None), next(iter(after), None), linears))
    groups: dict[int, list[str]] = {}
    for unit in units:
        for name in unit.linears:
            groups.setdefault(id(inputs[name]), []).append(name)
    return Anatomy(units, [tuple(group) for group in groups.values()], calls)
