"""The `espalier` command. Results go to stdout, everything else to stderr; a refusal is one line and exit code 2."""

import contextlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer
from rich.console import Console
from typer.core import TyperGroup

from stages.errors import Refusal

if TYPE_CHECKING:
    from pipeline.config import ClusterConfig
    from pipeline.driver import PruneResult

# Quiet, and nothing sent anywhere: set before any of these libraries is imported.
for _name, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}.items():
    os.environ.setdefault(_name, _value)


class Interrupted(Exception):
    """Ctrl-C in a command. Typer would end with code 130 and not a word."""


class Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Prune large language models on a Ray cluster, and see which recipe was best.",
)
errors = Console(stderr=True, soft_wrap=True, highlight=False)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
PANELS = {
    **dict.fromkeys(("sparsity", "pattern", "criterion", "criterion_options"), "Masks"),
    **dict.fromkeys(("scope", "allocation", "refine"), "Masks"),
    **dict.fromkeys(("reconstruct", "inputs", "sweeps", "correction"), "Reconstruction"),
    **dict.fromkeys(("epochs", "batch", "learning_rate"), "Reconstruction"),
    **dict.fromkeys(("samples", "length", "eval", "seed"), "Text"),
    **dict.fromkeys(("experiment", "run_name"), "Record"),
}


def options_of(config: "type[ClusterConfig]") -> list[inspect.Parameter]:
    """A flag for every field of a configuration but `model`, in its order; values are checked by the configuration."""
    parameters = []
    for name, field in config.model_fields.items():
        if name in ("model", "overrides"):  # an argument; YAML only
            continue
        many = get_origin(field.annotation) is dict  # --criterion-option alpha=0.5 --criterion-option seed=1
        flag = f"--{(name.removesuffix('s') if many else name).replace('_', '-')}"
        is_bool = field.annotation is bool
        default = "" if field.is_required() or field.default in (None, {}) else f" [dim]\\[{field.default}][/dim]"
        help_text = (field.description or "") + (" [red]required[/red]" if field.is_required() else default)
        panel = PANELS.get(name, "What" if field.is_required() else "Where and how it runs")
        metavar = None if is_bool else "NAME=VALUE" if many else _metavar(field.annotation)
        option = typer.Option(flag, help=help_text, metavar=metavar, rich_help_panel=panel, show_default=False)
        kind = list[str] | None if many else bool if is_bool else str | None
        annotation = Annotated[kind, option]  # type: ignore[valid-type]
        default_value = False if is_bool else None
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default_value, annotation=annotation)
        )
    order = ["What", "Masks", "Reconstruction", "Text", "Where and how it runs", "Record"]
    return sorted(parameters, key=lambda p: order.index(p.annotation.__metadata__[0].rich_help_panel))


def _metavar(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    names: list[str] = []
    for part in get_args(annotation) or (annotation,):
        if get_origin(part) is Literal:
            names += map(str, get_args(part))
        elif part in (int, float) or get_origin(part) is Annotated or part is not type(None):
            base = get_args(part)[0] if get_origin(part) is Annotated else part
            names.append({int: "N", float: "X"}.get(base, "SIZE" if "Byte" in str(base) else "TEXT"))
    return "|".join(dict.fromkeys(name for name in names if "list" not in name))


def with_options(kind_name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that takes **values a flag for every field of the configuration class of that name."""

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        import pipeline.config

        kind = getattr(pipeline.config, kind_name)
        own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
        parameters = [*own, *options_of(kind)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
        return command

    return wrap


def given(values: dict[str, Any]) -> dict[str, Any]:
    """The options that were written on the command line."""
    return {name: value for name, value in values.items() if value is not None and value is not False and value != []}


@app.command()
@with_options("PruneConfig")
def prune(
    model: Annotated[str | None, typer.Argument(help="Checkpoint directory (safetensors) or hub id.")] = None,
    *,
    config: Annotated[Path | None, typer.Option(help="YAML with the same names; flags go before it.")] = None,
    as_json: Json = False,
    **values: Any,
) -> None:
    """Prune a model: score, mask, refit attention and MLP, write a plain checkpoint with exact zeros.

    Example: espalier prune ./llama --output ./llama-50 --calibration text.txt --eval held-out.txt --sparsity 0.5
    """
    from pipeline.config import PruneConfig, build_config, read_yaml

    wanted = (read_yaml(config) if config else {}) | given(values) | ({"model": model} if model else {})
    if {"sparsity", "pattern"} <= set(wanted) and not {"sparsity", "pattern"} <= set(given(values)):
        wanted.pop("pattern" if "sparsity" in given(values) else "sparsity")  # a flag overrides the YAML's other target
    request = build_config(wanted, PruneConfig)
    from pipeline.driver import prune as run

    with stdout_kept():
        result = run(request)
    show_result(result, as_json)


@app.command()
def resume(
    directory: Annotated[Path, typer.Argument(help="The output directory of an interrupted run.")],
    shards: Annotated[int | None, typer.Option(min=1, help="Go on with another number of shards.")] = None,
    as_json: Json = False,
) -> None:
    """Go on with an interrupted run; the result is the same, byte for byte.

    Example: espalier resume ./llama-50
    """
    from pipeline.driver import resume as run

    with stdout_kept():
        result = run(directory, shards)
    show_result(result, as_json)


@app.command(name="eval")
@with_options("EvalConfig")
def evaluate(
    model: Annotated[str, typer.Argument(help="Checkpoint directory (safetensors) or hub id.")],
    *,
    as_json: Json = False,
    **values: Any,
) -> None:
    """Measure perplexity: every token but each window's first, windows that do not overlap.

    Example: espalier eval ./llama-50 --data held-out.txt --against ./llama
    """
    from pipeline.config import EvalConfig, build_config

    request = build_config(given(values) | {"model": model}, EvalConfig)
    from pipeline.evaluate import evaluate as run
    from pipeline.show import evaluation_table

    with stdout_kept():
        result = run(request)
    show(result, as_json, lambda: evaluation_table(result))


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Checkpoint directory, config.json, or hub id.")],
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="0: CPU shards, as many as --shards.")] = 0,
    gpu_memory: Annotated[str, typer.Option(help="Of one GPU, such as 80GB.")] = "80GB",
    memory: Annotated[str | None, typer.Option(help="Of one machine, for CPU shards; default: this one's.")] = None,
    shards: Annotated[
        int | None, typer.Option(min=1, help="Default: one a GPU, or one a core of this machine.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 128,
    length: Annotated[str, typer.Option(help="Tokens in a window.")] = "auto",
    spool_memory: Annotated[str, typer.Option(help="Memory of a shard for activations.")] = "1GiB",
    reconstruct: Annotated[str, typer.Option(help="component or none.")] = "component",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    as_json: Json = False,
) -> None:
    """Shards, bytes and memory from a config alone: no weights, no GPU, no cluster needed.

    Example: espalier plan ./llama-70b/config.json --nodes 2 --gpus-per-node 4 --gpu-memory 80GB
    """
    from pipeline.forecast import forecast
    from pipeline.show import plan_table

    result = forecast(
        model,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        gpu_memory=gpu_memory,
        memory=memory,
        shards=shards,
        samples=samples,
        length=length,
        spool_memory=spool_memory,
        reconstruct=reconstruct,
        dtype=dtype,
    )
    show(result, as_json, lambda: plan_table(result))


@app.command()
def compare(
    selection: Annotated[list[str] | None, typer.Argument(help="An MLflow experiment, or runs.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write a table and a plot here.")] = None,
    as_json: Json = False,
) -> None:
    """Put the runs of an experiment side by side, and draw perplexity against sparsity.

    Example: espalier compare espalier --out comparison
    """
    from pipeline.compare import compare as run

    comparison = run(selection or [], out=out)
    show({"runs": comparison.rows, "files": [str(file) for file in comparison.files]}, as_json, comparison.table)
    for file in comparison.files:
        errors.print(f"wrote {file}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def submit(
    context: typer.Context,
    address: Annotated[str | None, typer.Option(help="Cluster (host:port) or its dashboard (http://...).")] = None,
    follow: Annotated[bool, typer.Option(help="Show the job's output and wait for its end.")] = True,
) -> None:
    """Run an espalier command as a job on a Ray cluster; its output and exit code come back.

    Example: espalier submit --address head:6379 -- prune /data/llama --output /data/out --calibration /data/text.txt
    """
    if not context.args:
        raise Refusal("submit: nothing to run; write `espalier submit -- prune ...`")
    from pipeline.submit import submit_command

    raise typer.Exit(submit_command(context.args, address=address, follow=follow))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="New or empty directory for the three pruned models.")] = Path(
        "demo-run"
    ),
    address: Annotated[str | None, typer.Option(help="An existing Ray cluster; default: one of its own.")] = None,
    as_json: Json = False,
) -> None:
    """Prune the bundled model three ways, offline, and compare: a minute or two on two cores.

    Example: espalier demo
    """
    from pipeline.demo.run import run_demo
    from pipeline.show import demo_tables

    with stdout_kept():
        result = run_demo(output, address)
    show(result, as_json, lambda: demo_tables(result))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what works on this machine, what is missing, and what will be slow.

    Example: espalier doctor
    """
    from dataclasses import asdict

    from pipeline.doctor import examine, exit_code, render

    findings = examine()
    show({"findings": [asdict(finding) for finding in findings]}, as_json, lambda: render(findings))
    raise typer.Exit(exit_code(findings))


def stdout_kept() -> contextlib.AbstractContextManager[Any]:
    """Within it, what libraries print goes to stderr; Ray tells on stdout, from a thread, that a worker died."""
    return contextlib.redirect_stdout(sys.stderr)


def show_result(result: "PruneResult", as_json: bool) -> None:
    from pipeline.show import result_table

    show(result.summary(), as_json, lambda: result_table(result.run))


def show(result: dict[str, Any], as_json: bool, table: Callable[[], Any]) -> None:
    """The result on stdout: one JSON object, or what `table` makes of it."""
    if as_json:
        typer.echo(json.dumps(result))
    else:
        Console(soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 140).print(table())


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 done, 1 a bug, 2 refused, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments and "--" not in arguments[: arguments.index("--debug")]
    if debug:
        arguments.remove("--debug")
    try:
        return app(args=arguments, prog_name="espalier", standalone_mode=False) or 0
    except (KeyboardInterrupt, Interrupted, typer.Abort):
        errors.print(f"espalier: interrupted{_how_to_resume(arguments)}", markup=False)
        return 130
    except Exception as error:
        if debug:
            raise
        # Typer's own complaints (an unknown flag, a missing argument) format themselves.
        format_message = getattr(error, "format_message", error.__str__ if isinstance(error, Refusal) else None)
        if format_message is not None:
            errors.print(f"espalier: {' '.join(format_message().split())}", markup=False)
            return 2
        errors.print(f"espalier: unexpected {type(error).__name__}: {error}; run again with --debug", markup=False)
        return 1


def _how_to_resume(arguments: list[str]) -> str:
    if arguments[:1] == ["resume"]:
        return f"; `espalier {' '.join(arguments)}` goes on"
    for position, argument in enumerate(arguments):
        output = argument.removeprefix("--output=") if argument.startswith("--output=") else None
        if argument == "--output" and position + 1 < len(arguments):
            output = arguments[position + 1]
        if output and (Path(output) / "espalier" / "run.json").exists():
            return f"; `espalier resume {output}` goes on"
    return ""


if __name__ == "__main__":
    sys.exit(main())
