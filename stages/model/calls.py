"""The arguments that blocks are called with (positions, masks), where they differ from sample to sample too.

Most models call a block in the same way for all windows of one length. One that places image tokens on a grid
(Qwen2-VL) or lets them see one another (Gemma 3) does not: its calls depend on inputs of each sample, kept here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

Place = int | str  # of an argument: a number among the positional ones behind the hidden states, or a keyword


@dataclass(frozen=True, slots=True)
class Call:
    """How a module was called, its hidden states left out: `run` puts others in their place."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str | None  # the keyword that carried the hidden states; None: first positional
    packed: bool = field(default=False, kw_only=True)  # the module takes all samples' positions as one sequence

    def run(self, module: Callable[..., Any], hidden: Tensor) -> Tensor:
        """The module's (first) output on `hidden` (samples, length, width)."""
        given = hidden.flatten(0, 1) if self.packed else hidden
        if self.keyword is None:
            output = first(module(given, *self.args, **self.kwargs))
        else:
            output = first(module(*self.args, **{**self.kwargs, self.keyword: given}))
        return output if output.ndim == hidden.ndim else output.unflatten(0, hidden.shape[:2])

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What a module called with those arguments is given, as `run` takes it."""
        return self.hidden_of(args, kwargs)

    @property
    def arguments(self) -> dict[Place, Any]:
        """All arguments but the hidden states, by their places."""
        return dict((*enumerate(self.args), *self.kwargs.items()))

    def having(self, changes: Mapping[Place, Any]) -> "Call":
        """The same call with those arguments in place of its own."""
        args = tuple(changes.get(number, value) for number, value in enumerate(self.args))
        return replace(self, args=args, kwargs={name: changes.get(name, value) for name, value in self.kwargs.items()})

    def at(self, samples: Sequence[int]) -> "Call":
        """The call for those samples of the calibration: here, the same for all (see espalier.stages.model.calls)."""
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
    """A module's hidden states: its output, or the first of several."""
    return output[0] if isinstance(output, tuple | list) else output


BY_SAMPLE = ("image_grid_thw",)  # of such inputs, those that are no entry a token
Make = Callable[[int, int, Mapping[str, Tensor] | None], list[Call]]  # (samples, length, inputs) -> a call a layer


class Varying:
    """The samples' own inputs that shape calls: name -> (samples, ..., length), and `make`, which makes calls of some.

    `make` is `Skeleton.calls`.
    """

    def __init__(self, inputs: Mapping[str, Tensor], make: Make) -> None:
        self._inputs, self._make = dict(inputs), make
        self._last: tuple[tuple[int, ...], int | None] = (), None
        self._calls: list[Call] = []
        self._passed: dict[tuple[int, int], int] = {}  # block and stream -> samples that went through in this pass

    def __len__(self) -> int:
        return len(next(iter(self._inputs.values())))

    def calls(self, samples: Sequence[int], length: int | None = None) -> list[Call]:
        """How each layer is called for those samples together, or for their first `length` tokens."""
        if (tuple(samples), length) != self._last:
            chosen = {name: values[list(samples)] for name, values in self._inputs.items()}
            chosen |= {name: values[..., :length] for name, values in chosen.items() if name not in BY_SAMPLE}
            tokens = next(iter(chosen.values())).shape[-1]
            self._calls = self._make(len(samples), tokens, chosen)  # of these alone: tables of all would fill memory
            self._last = tuple(samples), length
        return self._calls

    def next_call(self, index: int, samples: int, stream: int = 0) -> Call:
        """Layer `index`'s call for so many samples, the next of a pass; behind the last comes the first again.
        `stream` tells apart what goes through the layer side by side."""
        start = self._passed.get((index, stream), 0) % len(self)
        self._passed[index, stream] = start + samples
        return self.calls(range(start, start + samples))[index]

    @property
    def first(self) -> dict[str, Tensor]:
        """The first sample's inputs."""
        return {name: values[:1] for name, values in self._inputs.items()}

    def call(self, index: int, length: int) -> "PerSampleCall":
        """Layer `index`'s call: for the first sample's first `length` tokens as it stands, for others by `at`."""
        first = self.calls([0], length)[index]
        return _varied(first, lambda samples: self.calls(samples)[index])


class LayerCalls:
    """How blocks are called in a pass: for samples of its own each in its way, else for all of one length alike."""

    def __init__(self, make: Make) -> None:
        self._make = make
        self._varying: Varying | None = None
        self._alike: dict[tuple[int, int], list[Call]] = {}  # (samples, length) -> how each block is called for them

    def begin(self, varying: Mapping[str, Tensor] | None) -> None:
        """A pass begins, whose samples have these inputs that shape calls."""
        self._varying = Varying(varying, self._make) if varying else None
        self._alike.clear()

    @property
    def first(self) -> dict[str, Tensor]:
        """The first sample's own inputs."""
        return self._varying.first if self._varying else {}

    def of_one(self, index: int, length: int) -> Call:
        """Block `index`'s call for one sample, which serves any number of them, or is made anew for their number."""
        if self._varying:
            return self._varying.call(index, length)
        one, two = (self._calls(samples, length)[index] for samples in (1, 2))
        if _spreads(one, two):
            return one
        return _varied(one, lambda samples: self._calls(len(samples), length)[index])

    def _calls(self, samples: int, length: int) -> list[Call]:
        if (samples, length) not in self._alike:
            self._alike[samples, length] = self._make(samples, length, None)
        return self._alike[samples, length]

    def following(self, index: int, samples: int, length: int, stream: int = 0) -> Call:
        """Block `index`'s call for so many samples, the next of the pass, of one of its streams."""
        if self._varying is not None:
            return self._varying.next_call(index, samples, stream)
        return self._calls(samples, length)[index]


def _spreads(one: Call, two: Call) -> bool:
    """Whether the tensors of a call for one sample are, repeated along single axes, those of a call for two. BLOOM's
    biases are not: they have a row for each head of each sample."""
    pairs = zip(tensors_in((one.args, one.kwargs)), tensors_in((two.args, two.kwargs)), strict=True)
    return all(small in (1, large) for a, b in pairs for small, large in zip(a.shape, b.shape, strict=True))


@dataclass(frozen=True, slots=True)
class PerSampleCall(Call):
    """A call as it is for one sample; `source` makes it for others."""

    source: Callable[[Sequence[int]], Call]

    def at(self, samples: Sequence[int]) -> Call:
        return self.source(samples)

    def to(self, dtype: torch.dtype) -> "PerSampleCall":
        cast = Call(self.args, self.kwargs, self.keyword, packed=self.packed).to(dtype)
        return _varied(cast, lambda samples: self.source(samples).to(dtype))


def _varied(call: Call, source: Callable[[Sequence[int]], Call]) -> PerSampleCall:
    return PerSampleCall(call.args, call.kwargs, call.keyword, source, packed=call.packed)


def inside(inner: Call, outer: Call) -> Call:
    """How a block that is called as `outer` calls the component that it called as `inner` in the same pass.

    What varies must have been handed on as it was: the block's very tensors are what tells them apart.
    """
    inner = replace(inner, packed=outer.packed)
    if not isinstance(outer, PerSampleCall):
        return inner
    handed = {id(tensor) for tensor in tensors_in((outer.args, outer.kwargs))}
    if not any(id(tensor) in handed for tensor in tensors_in((inner.args, inner.kwargs))):
        return inner

    def source(samples: Sequence[int]) -> Call:
        fresh = outer.at(samples)
        pairs = zip(
            tensors_in((outer.args, outer.kwargs)), tensors_in((fresh.args, fresh.kwargs)), strict=True
        )  # one layer's calls have one structure
        swapped = {id(old): new for old, new in pairs}
        args, kwargs = _replaced((inner.args, inner.kwargs), swapped)
        return replace(inner, args=args, kwargs=kwargs)

    return _varied(inner, source)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors among arguments, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def _replaced(value: Any, swapped: Mapping[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return swapped[id(value)]  # a tensor that the block made itself would vary unseen: a KeyError, not a guess
    if isinstance(value, tuple | list):
        return type(value)(_replaced(item, swapped) for item in value)
    if isinstance(value, dict):
        return {key: _replaced(item, swapped) for key, item in value.items()}
    return value
