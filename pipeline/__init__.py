"""What a run is: configuration, plan, driver, record.

from pipeline import PruneConfig, prune
result = prune(PruneConfig(model="...", output="...", calibration="text.txt", eval="held-out.txt"))
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config import PruneConfig
    from pipeline.driver import PruneResult, prune

__all__ = ["PruneConfig", "PruneResult", "prune"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: the command line answers --help without importing torch and Ray.
    if name == "PruneConfig":
        from pipeline.config import PruneConfig

        return PruneConfig
    if name in ("prune", "PruneResult"):
        import pipeline.driver

        return getattr(pipeline.driver, name)
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
