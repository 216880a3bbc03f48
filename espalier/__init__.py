"""Prunes large language models on a Ray cluster, and shows which recipe was best.

    from espalier import PruneConfig, prune
    result = prune(PruneConfig(model="...", output="...", calibration="text.txt", eval="held-out.txt"))

The folders beside this file are links to where the code lies, so that everything of it has one name, `espalier. ...`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from espalier.pipeline.commands.compare import Comparison, compare
    from espalier.pipeline.commands.evaluate import evaluate
    from espalier.pipeline.commands.load import load
    from espalier.pipeline.config.prune import EvalConfig, PruneConfig
    from espalier.pipeline.config.retrain import RetrainConfig
    from espalier.pipeline.config.track import TrackConfig
    from espalier.pipeline.pruning.prune import PruneResult, prune
    from espalier.pipeline.retraining.run import RetrainResult, retrain
    from espalier.pipeline.weight_tracking.track import TrackResult, track
    from espalier.stages.errors import Refusal

_PLACES = {
    "Comparison": "pipeline.commands.compare",
    "EvalConfig": "pipeline.config.prune",
    "PruneConfig": "pipeline.config.prune",
    "PruneResult": "pipeline.pruning.prune",
    "Refusal": "stages.errors",
    "RetrainConfig": "pipeline.config.retrain",
    "RetrainResult": "pipeline.retraining.run",
    "TrackConfig": "pipeline.config.track",
    "TrackResult": "pipeline.weight_tracking.track",
    "compare": "pipeline.commands.compare",
    "evaluate": "pipeline.commands.evaluate",
    "load": "pipeline.commands.load",
    "prune": "pipeline.pruning.prune",
    "retrain": "pipeline.retraining.run",
    "track": "pipeline.weight_tracking.track",
}
__all__ = [
    "Comparison",
    "EvalConfig",
    "PruneConfig",
    "PruneResult",
    "Refusal",
    "RetrainConfig",
    "RetrainResult",
    "TrackConfig",
    "TrackResult",
    "compare",
    "evaluate",
    "load",
    "prune",
    "retrain",
    "track",
]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: the command line answers --help without importing torch and Ray.
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
