"""What a run is: configuration, plan, driver, record.

result = prune(PruneConfig(model="...", output="...", calibration="text.txt", eval="held-out.txt"))
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config.prune import PruneConfig
    from pipeline.pruning.prune import PruneResult, prune

__all__ = ["PruneConfig", "PruneResult", "prune"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: the command line answers --help without importing torch and Ray.
    if name == "PruneConfig":
        from pipeline.config.prune import PruneConfig

        return PruneConfig
    if name in ("prune", "PruneResult"):
        import pipeline.pruning.prune

        return getattr(pipeline.pruning.prune, name)
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
