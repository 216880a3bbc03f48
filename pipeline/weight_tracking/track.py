"""`espalier track`: train while a shadow of the weights is kept, prune by it at a sweep of thresholds, fine-tune, and
draw loss against sparsity (arXiv 2502.17071, as one command).

OUTPUT/trained/              the dense model, its shadow beside it in trained/shadow
OUTPUT/sparsity-60/pruned    what a threshold left of it
OUTPUT/sparsity-60/tuned     the same, fine-tuned with its zeros fixed
OUTPUT/report.md, curve.png  and run.json in OUTPUT/espalier

Each of these is a finished directory or is made again, so an interrupted experiment goes on from what is there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from espalier.cluster.rank_group import RankGroup
from espalier.pipeline.config.options import build_config, located
from espalier.pipeline.config.track import TrackConfig
from espalier.pipeline.record.run_record import TrackPoint, TrackRecord
from espalier.pipeline.run.directory import RunDirectory, check_free, command_of
from espalier.pipeline.run.progress import Reporter
from espalier.pipeline.weight_tracking.experiment import Experiment, finished_run
from espalier.stages.errors import Refusal

WHERE = {"ranks", "threads", "address", "run_name", "published"}  # what may be another when an experiment goes on
SUMMARY = ("output", "metric", "trained", "points", "seconds", "picture", "report", "mlflow_run_id", "tracking_uri")


@dataclass(frozen=True, slots=True)
class TrackResult:
    """What a finished experiment gave; `run` is all of run.json.

    Each of `points` has target (the rate or share asked for), rate, sparsity (share of zeros among prunable weights),
    pruned and tuned (the metric before and after fine-tuning), steps, seconds, checkpoint and mlflow_run_id.
    """

    output: Path
    trained: float  # the metric after training, before anything is pruned
    points: list[TrackPoint]
    run: TrackRecord

    def summary(self) -> dict[str, Any]:
        """The object that `track --json` prints."""
        run: Mapping[str, Any] = self.run
        return {name: run[name] for name in SUMMARY}


def track(config: TrackConfig, reporter: Reporter | None = None, ranks: RankGroup | None = None) -> TrackResult:
    """Run the experiment, or go on with the same one where it was interrupted.

    `ranks`: ranks that are running, to use one set for several experiments; else it starts its own. Raises Refusal for
    what cannot work, and for an output that holds something else.
    """
    config = located(config, "data", "model")
    output = Path(config.output)
    if command_of(output) == "track" and finished_run(output) is None:
        return resume(output, reporter, ranks, config)
    check_free(output)
    directory, run = RunDirectory.begin(output, "track", config.model_dump(mode="json"), None)
    with directory.at_work(lambda: (output / "trained").exists()):
        return _result(Experiment(config, directory, cast(TrackRecord, run), reporter, ranks))


def resume(
    output: Path, reporter: Reporter | None = None, ranks: RankGroup | None = None, config: TrackConfig | None = None
) -> TrackResult:
    """Go on with an interrupted experiment; `config`, if given, must be its own but for where it runs.

    Raises Refusal if there is none, if it is finished, or if it was asked for something else.
    """
    directory, run = RunDirectory.reopen(output.expanduser().absolute())
    with directory.at_work():
        recorded = build_config({k: v for k, v in run["config"].items() if v is not None}, TrackConfig)
        for name, was in recorded.model_dump().items():
            if config is not None and name not in WHERE and getattr(config, name) != was:
                raise Refusal(
                    f"{name.replace('_', '-')} {getattr(config, name)}: the experiment in {output} was begun with "
                    f"{was}; give that, or another --output"
                )
        return _result(Experiment(config or recorded, directory, cast(TrackRecord, run), reporter, ranks))


def _result(experiment: Experiment) -> TrackResult:
    """What it gave, run to its end."""
    experiment.go()
    run = experiment.run
    return TrackResult(experiment.output, run["trained"], run["points"], run)
