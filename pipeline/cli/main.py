"""The `espalier` command. Results go to stdout, everything else to stderr; a refusal is one line and exit code 2."""

import os
import shlex
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from espalier.cluster.connection.redact import without_secrets
from espalier.cluster.connection.watchdog import end_clusters
from espalier.pipeline.cli import retrain as cli_retrain
from espalier.pipeline.cli import submit as cli_submit
from espalier.pipeline.cli import track as cli_track
from espalier.pipeline.cli.flags import Json, given, request_of, show, stdout_kept, with_all_options, with_options
from espalier.pipeline.run.stopping import at_the_last, exit_code, how_to_go_on
from espalier.stages.errors import Refusal

if TYPE_CHECKING:
    from espalier.pipeline.pruning.prune import PruneResult

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

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is run, with the flags that only then are made: `espalier --help` needs none of them."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if command is None else with_all_options(command), rest


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Prune large language models on a Ray cluster, and see which recipe was best.",
)
PACKAGES = ("torch", "transformers", "ray", "deepspeed", "mlflow")  # whose versions a report of a fault should name
errors = Console(stderr=True, soft_wrap=True, highlight=False)


def _show_version(wanted: bool) -> None:
    """The version, and those of what it stands on, read from what is installed: nothing of it is imported."""
    if not wanted:
        return
    python = ".".join(map(str, sys.version_info[:3]))
    about = (f"{name} {installed(name) or 'not installed'}" for name in PACKAGES)
    typer.echo(f"espalier {installed('espalier-llm') or '(not installed)'}   Python {python}   {'   '.join(about)}")
    raise typer.Exit


def installed(name: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@app.callback()
def espalier(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show versions and exit.")
    ] = False,
) -> None:
    """What stands before any command."""


@app.command()
@with_options("espalier.pipeline.config.prune:PruneConfig")
def prune(
    model: Annotated[str | None, typer.Argument(help="Checkpoint directory (safetensors) or hub id.")] = None,
    *,
    config: Annotated[Path | None, typer.Option(help="YAML with the same names; flags go before it.")] = None,
    as_json: Json = False,
    **values: Any,
) -> None:
    """Prune a model: score, mask, reconstruct attention and MLP, write a plain checkpoint with exact zeros.

    Example: espalier prune ./llama --output ./llama-50 --calibration text.txt --eval held-out.txt --sparsity 0.5
    """
    from espalier.pipeline.config.prune import PruneConfig

    request = request_of(PruneConfig, config, model, values)
    from espalier.pipeline.pruning.prune import prune as run

    with stdout_kept():
        result = run(request)
    show_result(result, as_json)


@app.command()
def resume(
    directory: Annotated[Path, typer.Argument(help="The output directory of an interrupted run.")],
    shards: Annotated[int | None, typer.Option(min=1, help="Go on with another number of shards.")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Of a retrain: go on with another number of ranks.")] = None,
    zero_stage: Annotated[int | None, typer.Option(help="Of a retrain: go on in another ZeRO stage.")] = None,
    as_json: Json = False,
) -> None:
    """Go on with an interrupted run. A pruning run's result is the same, byte for byte.

    Example: espalier resume ./llama-50
    """
    from espalier.pipeline.run.directory import command_of

    if command_of(directory) == "retrain":
        cli_retrain.resume(directory, shards, ranks, zero_stage, as_json)
        return
    if ranks is not None or zero_stage is not None:
        raise Refusal(f"{directory}: not a training run; --ranks and --zero-stage are for those")
    if command_of(directory) == "track":
        cli_track.resume(directory, as_json)
        return
    from espalier.pipeline.pruning.prune import resume as run

    with stdout_kept():
        result = run(directory, shards)
    show_result(result, as_json)


app.command()(cli_retrain.retrain)
app.command()(cli_track.track)


@app.command(name="eval")
@with_options("espalier.pipeline.config.prune:EvalConfig")
def evaluate(
    model: Annotated[str, typer.Argument(help="Checkpoint directory (safetensors) or hub id.")],
    *,
    as_json: Json = False,
    **values: Any,
) -> None:
    """Measure perplexity: every token but each window's first, windows that do not overlap.

    Example: espalier eval ./llama-50 --data held-out.txt --against ./llama
    """
    from espalier.pipeline.config.options import build_config
    from espalier.pipeline.config.prune import EvalConfig

    request = build_config(given(values) | {"model": model}, EvalConfig)
    from espalier.pipeline.cli.tables import evaluation_table
    from espalier.pipeline.commands.evaluate import evaluate as run

    with stdout_kept():
        result = run(request)
    show(result, as_json, lambda: evaluation_table(result))


@app.command()
def plan(
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint directory, config.json, or hub id; without: prints the recipe.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, metavar="N", help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, metavar="N", help="0: CPU shards, as many as --shards.")] = 0,
    gpu_memory: Annotated[str, typer.Option(metavar="SIZE", help="Of one GPU, such as 80GB.")] = "80GB",
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of one machine, for CPU shards; default: this one's.")
    ] = None,
    shards: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Default: one a GPU, or one a core of this machine.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="Calibration windows.")] = 128,
    length: Annotated[str, typer.Option(metavar="N|auto", help="Tokens in a window.")] = "auto",
    spool_memory: Annotated[str, typer.Option(metavar="SIZE", help="Memory of a shard for activations.")] = "1GiB",
    recipe: Annotated[
        str, typer.Option(metavar="NAME", help="What is done to each layer: fast, balanced or best.")
    ] = "balanced",
    reconstruct: Annotated[
        str | None, typer.Option(metavar="NAME", help="Another unit than the recipe's, as for prune.")
    ] = None,
    tower: Annotated[str, typer.Option(metavar="NAME", help="language or vision.")] = "language",
    compute: Annotated[
        str, typer.Option(metavar="NAME", help="What blocks are computed in: auto, fp32, bf16 or fp16.")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="What weights are held in: auto, float32, bfloat16 or float16.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Shards, bytes and memory from a config alone: no weights, no GPU, no cluster needed. Without a model: a recipe.

    Example: espalier plan ./llama-70b/config.json --nodes 2 --gpus-per-node 4 --gpu-memory 80GB
    """
    if model is None:
        from espalier.pipeline.config.named_recipe import recipe_options, recipe_text

        text = recipe_text(recipe)
        show({"recipe": recipe} | recipe_options(recipe), as_json, lambda: Text(text, end=""))
        return
    from espalier.pipeline.cli.tables import plan_table
    from espalier.pipeline.commands.plan import forecast

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
        recipe=recipe,
        reconstruct=reconstruct,
        dtype=dtype,
        compute=compute,
        tower=tower,
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
    from espalier.pipeline.commands.compare import compare as run

    comparison = run(selection or [], out=out)
    show({"runs": comparison.rows, "files": [str(file) for file in comparison.files]}, as_json, comparison.table)
    for file in comparison.files:
        errors.print(f"wrote {file}")


app.add_typer(cli_submit.app, name="submit")


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
    from espalier.pipeline.cli.tables import demo_tables
    from espalier.pipeline.demo.run import run_demo

    with stdout_kept():
        result = run_demo(output, address)
    show(result, as_json, lambda: demo_tables(result))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what works on this machine, what is missing, and what will be slow.

    Example: espalier doctor
    """
    from dataclasses import asdict

    from espalier.pipeline.commands.doctor import examine, exit_code, render

    findings = examine()
    show({"findings": [asdict(finding) for finding in findings]}, as_json, lambda: render(findings))
    raise typer.Exit(exit_code(findings))


def show_result(result: "PruneResult", as_json: bool) -> None:
    from espalier.pipeline.cli.tables import result_table

    show(result.summary(), as_json, lambda: result_table(result.run))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 done, 1 a bug, 2 refused, 130 interrupted, 143 and 129 by SIGTERM and SIGHUP."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments and "--" not in arguments[: arguments.index("--debug")]
    if debug:
        arguments.remove("--debug")
        sys.excepthook = _show_traceback
    try:
        with at_the_last(end_clusters):
            return app(args=arguments, prog_name="espalier", standalone_mode=False) or 0
    except (KeyboardInterrupt, Interrupted, typer.Abort) as stop:
        errors.print(f"espalier: interrupted; {_how_to_go_on(arguments, stop)}", markup=False)
        return exit_code()
    except Exception as error:
        if debug:
            raise
        # Typer's own complaints (an unknown flag, a missing argument) format themselves.
        format_message = getattr(error, "format_message", error.__str__ if isinstance(error, Refusal) else None)
        if format_message is not None:
            errors.print(f"espalier: {without_secrets(' '.join(format_message().split()))}", markup=False)
            return 2
        text = without_secrets(f"{type(error).__name__}: {error}")
        errors.print(f"espalier: unexpected {text}; run again with --debug", markup=False)
        return 1


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A whole traceback on stderr, but for what may not be shown."""
    sys.stderr.write(without_secrets("".join(traceback.format_exception(kind, error, trace))))


def _how_to_go_on(arguments: list[str], stop: BaseException) -> str:
    if arguments[:1] == ["resume"]:
        return f"`espalier {shlex.join(arguments)}` goes on"
    return how_to_go_on(stop) or "give the same command again"
