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

    M = TypeVar("M", bound=BaseModel)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.", metavar="")]
LONGEST_METAVAR = 16  # characters of choices beside a flag; at 80 columns more would cut flags and break words
PANELS = {
    "tower": "What",
    "recipe": "What",
    **dict.fromkeys(("sparsity", "pattern", "threshold", "criterion", "criterion_options"), "Masks"),
    **dict.fromkeys(("scope", "allocation", "refine", "solve", "targets"), "Masks"),
    **dict.fromkeys(("reconstruct", "inputs", "sweeps", "correction"), "Reconstruction"),
    **dict.fromkeys(("tolerance", "epochs", "batch", "learning_rate"), "Reconstruction"),
    **dict.fromkeys(("samples", "length", "bos", "text_column", "eval", "seed"), "Text"),
    **dict.fromkeys(("masked", "mask"), "Masks"),
    **dict.fromkeys(("steps", "tokens", "microbatch", "schedule", "warmup"), "Training"),
    **dict.fromkeys(("weight_decay", "beta2", "clip", "eval_every", "checkpoint_every"), "Training"),
    **dict.fromkeys(("shadow", "shadow_schedule", "shadow_decay", "shadow_signed", "shadow_window"), "Shadow"),
    **dict.fromkeys(("shadow_dtype", "shadow_rounding", "shadow_every"), "Shadow"),
    **dict.fromkeys(("data_kind", "data_options", "held_out"), "Text"),
    **dict.fromkeys(("score", "rates", "sparsities"), "Masks"),
    **dict.fromkeys(("finetune_epochs", "finetune_steps", "finetune_learning_rate"), "Training"),
    **dict.fromkeys(("experiment", "run_name", "parent_run"), "Record"),
}
ORDER = ("What", "Masks", "Reconstruction", "Training", "Shadow", "Text", "Where and how it runs", "Record")
# Of the names that several commands have, which panel they are shown in where it is another one.
PANELS_OF = {
    **dict.fromkeys(("RetrainConfig", "TrackConfig"), dict.fromkeys(("epochs", "batch", "learning_rate"), "Training")),
    "PruneConfig": {"microbatch": "Where and how it runs", "shadow": "Masks"},
    "EvalConfig": {"microbatch": "Where and how it runs", "against": "What"},
}


def options_of(config: "type[BaseModel]") -> list[inspect.Parameter]:
    """A flag for every field of a configuration but `model`, in its order; values are checked by the configuration."""
    parameters = []
    for name, field in config.model_fields.items():
        if name in ("model", "overrides", "published"):  # an argument; YAML only
            continue
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
        help_text = listed + (field.description or "") + (" [red]required[/red]" if field.is_required() else default)
        usual = PANELS.get(name, "What" if field.is_required() else "Where and how it runs")
        panel = PANELS_OF.get(config.__name__, {}).get(name, usual)
        metavar = "" if is_bool else "NAME=VALUE" if many else _metavar(field.annotation)
        option = typer.Option(
            flag,
            help=help_text,
            metavar=metavar,
            rich_help_panel=panel,
            show_default=False,
            autocompletion=_one_of(_words(field.annotation)),
        )
        kind = list[str] | None if many else bool | None if is_bool else str | None
        annotation = Annotated[kind, option]  # type: ignore[valid-type]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    return sorted(parameters, key=lambda p: ORDER.index(p.annotation.__metadata__[0].rich_help_panel))


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
