"""What a criterion is: a score function, what it needs, its options and their rules; how a user's own is imported."""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

from torch import Tensor

from espalier.stages.errors import Refusal, unknown
from espalier.stages.masks import Scope

Need = Literal["hessian", "outputs", "importance"]
TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class Target(NamedTuple):
    """How much of a matrix goes: a ratio, within each row or over the matrix, or N:M."""

    sparsity: float | None
    pattern: tuple[int, int] | None
    scope: Scope


@dataclass(frozen=True)
class Rule:
    """What an option's value must be: stands beside its type in the criterion's signature, in Annotated[type, Rule]."""

    text: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Option:
    """A keyword of a criterion that has a default: what may be set from outside."""

    kind: type
    rule: Rule | None


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """A score function and what the work must know about it."""

    function: Callable[..., Tensor]
    """(weight (O, I), statistics, **prepared, **options) -> scores (O, I); a higher score survives longer."""
    prepare: Callable[..., dict[str, Tensor]] | None = None
    """(whole weight, statistics, **options) -> what the function needs of the layer as a whole, by keyword: (I,) for
    its columns, (O, 1) for its rows. With it the function may be given some of the rows, and what is theirs."""
    solve: Callable[..., tuple[Tensor, Tensor | None]] | None = None
    """For a criterion that also moves the weights that stay: (weight, statistics, target, keep, **options)
    -> (keep, values or None), choosing the mask itself unless `keep` is one."""
    exact: bool = False
    """Its values are the best there are for its mask."""
    scopes: tuple[Scope, ...] = ("row", "matrix")
    """Within what its scores are compared, where there is a choice; the first unless said otherwise."""
    row_wise: bool = False
    """The function may be given some of the rows, and scores them as it would among all the others."""
    needs: frozenset[Need] = frozenset()
    """What the statistics must hold beyond the sums over inputs: the Hessian, or the sums over outputs. With
    "importance" the function is given, by the keyword `importance_OI`, what a shadow says of the weight (O, I)."""

    @property
    def options(self) -> dict[str, Option]:
        """Keywords with defaults, of the function, of its preparation and of its solution."""
        parts = (self.function, self.prepare, self.solve)
        return {name: option for part in parts if part for name, option in _options(part).items()}

    @property
    def from_shadow(self) -> bool:
        """It scores by what a training run left behind."""
        return "importance" in self.needs

    @property
    def seeded(self) -> bool:
        """It draws random numbers: whoever scores passes `seed`, one of its own for each layer."""
        return "seed" in self.options


@cache
def _options(function: Callable[..., Any]) -> dict[str, Option]:
    try:
        hints = get_type_hints(function, include_extras=True)
    except (TypeError, NameError):  # a callable object, or names that only type checkers see
        hints = {}
    options = {}
    for name, parameter in list(inspect.signature(function).parameters.items())[2:]:
        if parameter.default is parameter.empty:
            continue
        hint = hints.get(name, type(parameter.default))
        rule = next((extra for extra in get_args(hint)[1:] if isinstance(extra, Rule)), None)
        options[name] = Option(getattr(hint, "__origin__", hint), rule)
    return options


def taken_by(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that are the function's own."""
    return {name: value for name, value in options.items() if name in _options(function)}


def checked_options(name: str, criterion: Criterion, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the types that the criterion `name` takes. Raises Refusal for one that it does not take."""
    known = criterion.options
    checked = {}
    for option, value in options.items():
        if option not in known:
            public = [key for key in known if key != "seed"]
            raise Refusal(f"criterion {name}: option {option!r} {unknown(option, public, 'it takes')}")
        kind, rule = known[option].kind, known[option].rule
        try:
            checked[option] = _as(kind, value)
        except ValueError:
            raise Refusal(f"criterion {name}: option {option} = {value!r} is not of the type {kind.__name__}") from None
        if rule is not None and not rule.holds(checked[option]):
            raise Refusal(f"criterion {name}: option {option} = {value} must be {rule.text}")
    return checked


def _as(kind: type, value: Any) -> Any:
    """The value as a `kind`, from text or from a value of that type. Raises ValueError if it is none."""
    if isinstance(value, str) and kind is bool:
        if value.lower() not in TRUTHS:
            raise ValueError(value)
        return TRUTHS[value.lower()]
    if isinstance(value, str) and kind in (int, float):
        return kind(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(value)
    return value


def module_of(name: str) -> str:
    """The module of a user's own criterion; "" for a registered one, whose name has none."""
    return name.rpartition(":" if ":" in name else ".")[0]


def import_criterion(name: str) -> Criterion:
    """A user's own, `package.module.function` or `module:function`, from the current directory or the module path.

    A plain function is scored whole, unless its attributes `row_wise`, `prepare` or `needs` say more.
    Raises Refusal if it cannot be imported, or cannot be called with a weight and its statistics.
    """
    module_name, _, function_name = name.rpartition(":" if ":" in name else ".")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # last, so that nothing there stands in for an installed package
    try:
        found = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # whatever a user's module raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise Refusal(
            f"criterion {name}: cannot be imported ({reason}); "
            "it must be module.function, in the current directory or on PYTHONPATH"
        ) from None
    if isinstance(found, Criterion):
        return found
    if not callable(found):
        raise Refusal(f"criterion {name}: is a {type(found).__name__}, not a function of a weight and its statistics")
    attributes = {key: getattr(found, key) for key in ("row_wise", "prepare", "needs") if hasattr(found, key)}
    needs = frozenset(attributes.pop("needs", ()))
    if unknown := needs - set(get_args(Need)):
        raise Refusal(f"criterion {name}: needs {sorted(unknown)}; statistics can hold: {', '.join(get_args(Need))}")
    criterion = Criterion(function=found, needs=needs, **attributes)
    _check_signature(name, criterion)
    return criterion


def _check_signature(name: str, criterion: Criterion) -> None:
    """Raises Refusal unless the function can be called as criteria are, with options of types that text can give."""
    try:
        signature = inspect.signature(criterion.function)
        prepared = [key for key, value in signature.parameters.items() if value.kind is value.KEYWORD_ONLY]
        given = prepared if criterion.prepare else ["importance_OI"] if criterion.from_shadow else []
        signature.bind(None, None, **dict.fromkeys(given))
    except (TypeError, ValueError) as error:
        raise Refusal(f"criterion {name}: cannot be called as name(weight, statistics) ({error})") from None
    for option, value in criterion.options.items():
        if value.kind not in (float, int, str, bool):
            kind = getattr(value.kind, "__name__", str(value.kind))
            raise Refusal(f"criterion {name}: option {option} is a {kind}; float, int, str and bool can be set")
