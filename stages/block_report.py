"""What a shard reports of a block that it has pruned: as it travels, as a line of the journal, as an entry of run.json.

A field's meaning and unit: pipeline/README.md, "A block's report".
"""

from typing import TypedDict


class UnitReport(TypedDict):
    """What the fit of one unit did (`Fit` in stages/reconstruction/fit.py), and the unit's name."""

    name: str
    error_before: float
    error_after: float
    improved: bool
    share: float
    steps: int
    learning_rate: float
    flops: float


class LayerCount(TypedDict):
    """Zeros of one layer as it is written, and how many weights it has."""

    zeros: int
    weights: int


class WorkReport(TypedDict):
    """Of a block that is worked on, before it is on disk."""

    block: int
    sweep: int
    sparsity: float
    gflops: float | None
    seconds: dict[str, float]  # of `mask` and `reconstruct`; in a BlockReport of `stream` and `commit` too
    units: list[UnitReport]
    layers: dict[str, LayerCount]
    fallbacks: dict[str, int]
    spool_disk: int


class BlockReport(WorkReport):
    """Of a block that is on disk."""

    tokens: int
    tokens_per_second: float
    shard: int
    file: str
    digest: str
    peak_memory: int
