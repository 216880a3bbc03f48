"""`espalier retrain`, and what `espalier resume` does to its runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from espalier.pipeline.cli.flags import Json, request_of, show, stdout_kept, with_options
from espalier.stages.errors import Refusal

if TYPE_CHECKING:
    from espalier.pipeline.retraining.run import RetrainResult


@with_options("espalier.pipeline.config.retrain:RetrainConfig")
def retrain(
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint directory or hub id; or a config.json to begin at random.")
    ] = None,
    *,
    config: Annotated[Path | None, typer.Option(help="YAML with the same names; flags go before it.")] = None,
    as_json: Json = False,
    **values: Any,
) -> None:
    """Train a model under DeepSpeed ZeRO, each rank a Ray actor; --masked keeps a pruned model's zeros.

    Example: espalier retrain ./llama-50 --output ./llama-50-trained --data text.txt --eval held-out.txt --masked
    """
    from espalier.pipeline.config.retrain import RetrainConfig

    request = request_of(RetrainConfig, config, model, values)
    from espalier.pipeline.retraining.run import retrain as run

    with stdout_kept():
        result = run(request)
    show_result(result, as_json)


def resume(directory: Path, shards: int | None, ranks: int | None, zero_stage: int | None, as_json: bool) -> None:
    """Go on with a training run from its newest checkpoint."""
    if shards is not None:
        raise Refusal(f"shards {shards}: {directory} holds a training run, which has ranks; give --ranks")
    from espalier.pipeline.retraining.run import resume as run

    wanted = {"ranks": ranks, "zero_stage": zero_stage}
    changes = {name: value for name, value in wanted.items() if value is not None}
    with stdout_kept():
        result = run(directory, changes=changes)
    show_result(result, as_json)


def show_result(result: "RetrainResult", as_json: bool) -> None:
    """The finished run, on stdout."""
    from espalier.pipeline.cli.tables import training_table

    show(result.summary(), as_json, lambda: training_table(result.run))
