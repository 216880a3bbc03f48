"""What the commands share: flags made from a configuration's fields, and how results are shown."""

import contextlib
import inspect
import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from rich.console import Console

from espalier.cluster.connection.redact import storable

if TYPE_CHECKING:
    from pydantic import BaseModel

    from espalier.pipeline.config.options import Panel

    M = TypeVar("M", bound=BaseModel)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.", metavar="")]
LONGEST_METAVAR = 16  # characters of choices beside a flag; at 80 columns more would cut flags and break words


def options_of(config: "type[BaseModel]") -> list[inspect.Parameter]:
    """A flag for every field of a configuration but `model`, as the help shows them; the configuration checks them."""
    parameters = []
    for name, panel, text in _shown(config):
        field = config.model_fields[name]
        many = get_origin(field.annotation) is dict  # --criterion-option alpha=0.5 --criterion-option seed=1
        flag = f"--{(name.removesuffix('s') if many else name).replace('_', '-')}"
        is_bool = field.annotation is bool
        if is_bool and field.default is True:
            flag = f"{flag}/--no-{flag.removeprefix('--')}"
        choices = _words(field.annotation) if get_origin(field.annotation) is Literal else []
        listed = f"One of {', '.join(choices)}. " if len("|".join(choices)) > LONGEST_METAVAR else ""
        default = (
            ""
            if field.is_required() or field.default in (None, {}) or field.default is False
            else _default(field.default)
        )
        help_text = listed + text + (" [red]required[/red]" if field.is_required() else default)
        metavar = "" if is_bool else "NAME=VALUE" if many else _metavar(field.annotation)
        option = typer.Option(
            flag,
            help=help_text,
            metavar=metavar,
            rich_help_panel=panel.value,
            show_default=False,
            autocompletion=_one_of(_words(field.annotation)),
        )
        kind = list[str] | None if many else bool | None if is_bool else str | None
        annotation = Annotated[kind, option]  # type: ignore[valid-type]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    return parameters


def _shown(config: "type[BaseModel]") -> "list[tuple[str, Panel, str]]":
    """The fields that have a flag, as the help shows them: name, panel, text.

    What a field does not say of its flag itself, it has from the field of that name in the nearest base class.
    """
    from espalier.pipeline.config.options import Before, Panel

    names = [name for name in config.model_fields if name not in ("model", "overrides", "published")]  # argument; YAML
    panels, texts = {}, {}
    for name in list(names):
        bases = (getattr(base, "model_fields", {}) for base in config.__mro__)
        said = [fields[name] for fields in bases if name in fields]
        marks = [mark for field in said for mark in field.metadata]
        texts[name] = next((field.description for field in said if field.description), "")
        panels[name] = next((mark for mark in marks if isinstance(mark, Panel)), Panel.WHERE)
        if later := next((mark.name for mark in marks if isinstance(mark, Before)), None):
            names.remove(name)
            names.insert(names.index(later), name)
    return [(name, panel, texts[name]) for panel in Panel for name in names if panels[name] == panel]


def _default(value: Any) -> str:
    shown = value.human_readable() if hasattr(value, "human_readable") else value  # a size in bytes
    return f" [dim]\\[{shown}][/dim]"


def _one_of(words: list[str]) -> Callable[[str], list[str]] | None:
    """What a shell offers after an option that takes one of these words."""
    if not words:
        return None

    def starting(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return starting


def _words(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(word) for word in get_args(annotation)]
    return [word for part in get_args(annotation) for word in _words(part)]


def _metavar(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        choices = "|".join(map(str, get_args(annotation)))
        return choices if len(choices) <= LONGEST_METAVAR else "NAME"
    names: list[str] = []
    for part in get_args(annotation) or (annotation,):
        if get_origin(part) is Literal:
            names += map(str, get_args(part))
        elif part in (int, float) or get_origin(part) is Annotated or part is not type(None):
            base = get_args(part)[0] if get_origin(part) is Annotated else part
            names.append({int: "N", float: "X"}.get(base, "SIZE" if "Byte" in str(base) else "TEXT"))
    together = "|".join(dict.fromkeys(name for name in names if "list" not in name))
    return together if len(together) <= LONGEST_METAVAR else "TEXT"


def with_options(where: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that takes **values a flag for every field of the configuration class "module:name".

    That class's module imports torch, so `with_all_options` makes the flags, when the command is called for.
    """

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
        _sign(command, own)
        command.options_of = where  # type: ignore[attr-defined]
        return command

    return wrap


def with_all_options(command: Any) -> Any:
    """The command of typer's as it is called: with the flags that `with_options` promised, if it did."""
    where = getattr(command.callback, "options_of", None)
    if where is None:
        return command
    module, _, name = where.partition(":")
    called = command.callback.__wrapped__

    def whole(**values: Any) -> None:
        called(**values)

    whole.__doc__ = called.__doc__
    own = inspect.signature(called).parameters.values()
    _sign(whole, [*own, *options_of(getattr(import_module(module), name))])
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    alone.command(name=command.name)(whole)
    return typer.main.get_command(alone)


def _sign(function: Callable[..., None], parameters: list[inspect.Parameter]) -> None:
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}


def given(values: dict[str, Any]) -> dict[str, Any]:
    """The options that were written on the command line."""
    return {name: value for name, value in values.items() if value is not None and value != []}


def request_of(kind: "type[M]", file: Path | None, model: str | None, values: dict[str, Any]) -> "M":
    """What a command was asked for: the YAML `file`'s values, over them the flags, over these the argument.

    A flag that says how much to prune overrides the other ways in which the file says it. Raises Refusal.
    """
    from espalier.pipeline.config.options import build_config, read_yaml
    from espalier.stages.layer_rules import AMOUNTS

    flags = given(values)
    wanted = (read_yaml(file) if file else {}) | flags | ({"model": model} if model else {})
    if flagged := flags.keys() & AMOUNTS:
        wanted = {name: value for name, value in wanted.items() if name in flagged or name not in AMOUNTS}
    return build_config(wanted, kind)


def stdout_kept() -> contextlib.AbstractContextManager[Any]:
    """Within it, what libraries print goes to stderr; Ray tells on stdout, from a thread, that a worker died."""
    return contextlib.redirect_stdout(sys.stderr)


def show(result: dict[str, Any], as_json: bool, table: Callable[[], Any]) -> None:
    """The result on stdout: one JSON object, or what `table` makes of it."""
    if as_json:
        typer.echo(json.dumps(storable(result)))
    else:
        Console(soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 140).print(table())
