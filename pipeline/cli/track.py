"""`espalier track`: its flags, and what it shows."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from espalier.pipeline.cli.flags import Json, given, show, stdout_kept, with_options

if TYPE_CHECKING:
    from espalier.pipeline.weight_tracking.track import TrackResult


@with_options("espalier.pipeline.config.track:TrackConfig")
def track(
    recipe: Annotated[str, typer.Argument(help="shakespeare, shakespeare-small, or a YAML file with the same names.")],
    *,
    model: Annotated[
        str | None, typer.Option(help="A checkpoint to go on from, in place of the recipe's model.", metavar="DIR")
    ] = None,
    as_json: Json = False,
    **values: Any,
) -> None:
    """Train while tracking the weights, prune at a sweep of thresholds, fine-tune, draw loss against sparsity.

    Flags override the recipe. Given again, an interrupted experiment goes on.

    Example: espalier track shakespeare-small --data tinyshakespeare.txt --output tracked
    """
    from espalier.pipeline.config.track import load_config

    request = load_config(recipe, given(values | {"model": model}))
    from espalier.pipeline.weight_tracking.track import track as run

    with stdout_kept():
        result = run(request)
    show_result(result, as_json)


def resume(directory: Path, as_json: bool) -> None:
    """Go on with an interrupted experiment."""
    from espalier.pipeline.weight_tracking.track import resume as run

    with stdout_kept():
        result = run(directory)
    show_result(result, as_json)


def show_result(result: "TrackResult", as_json: bool) -> None:
    """The finished experiment, on stdout."""
    from espalier.pipeline.reports.track import track_table

    show(result.summary(), as_json, lambda: track_table(result.run))
