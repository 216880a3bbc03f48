"""What run.json holds, by command: written as the run goes, read by resume, the reports and the terminal.

Meanings and units are in pipeline/README.md ("`run.json`, field by field"), which a test holds to these classes. A run
that goes on, or is shown, may have been written by an earlier version, which had fewer fields.
"""

from typing import Any, Literal, NotRequired, TypedDict

from espalier.stages.block_report import BlockReport
from espalier.stages.metrics.energy import Joules
from espalier.stages.precision import Compute

Command = Literal["prune", "retrain", "track"]
Status = Literal["running", "interrupted", "failed", "finished"]


class ModelRecord(TypedDict):
    """The model that a run begins with."""

    path: str
    family: str
    tower: str
    images: bool
    blocks: int
    parameters: int
    prunable: int
    dtype: str


class ShardRecord(TypedDict):
    """Which blocks a shard has, and, once it is open, where it is."""

    index: int
    first: int
    last: int
    node: NotRequired[str]
    device: NotRequired[str]


class Estimate(TypedDict):
    """Bytes that were expected, of the driver and by part of each shard or rank."""

    driver: int
    resident: NotRequired[str]
    shards: NotRequired[list[dict[str, int]]]
    ranks: NotRequired[list[dict[str, int]]]


class PeakMemory(TypedDict, total=False):
    """Bytes that were used at most."""

    driver: int
    shards: list[int]
    ranks: list[int]


class Span(TypedDict):
    """A stretch of a shard's time."""

    phase: str
    block: int | None
    start: float
    end: float
    shard: int


class Spent(TypedDict):
    """What the phases of a run took."""

    seconds: dict[str, float]
    energy: dict[str, Joules]
    flops: dict[str, float]


class Cost(TypedDict):
    """What a kind of work of a track took; no joules where they were not measured."""

    seconds: float
    flops: float
    energy: Joules | None


class TunedPoint(TypedDict):
    """A point of a track's curve: pruned at one threshold and fine-tuned."""

    rate: float
    sparsity: float
    pruned: float
    tuned: float
    steps: int
    seconds: float
    checkpoint: str
    cost: dict[str, Cost]


class TrackPoint(TunedPoint):
    """The same with what was asked for, and where it is recorded."""

    target: float
    mlflow_run_id: str | None


class _Begun(TypedDict):
    run_id: str
    command: Command
    status: Status
    started: str
    config: dict[str, Any]  # the fields of a configuration of pipeline/config
    fingerprint: str | None
    output: str


class RunRecord(_Begun, total=False):
    """What every command writes; those that have no default are there from the beginning."""

    model: ModelRecord
    tracking_uri: str
    mlflow_run_id: str | None


class CheckpointRecord(RunRecord, total=False):
    """What prune and retrain both write: of a run that makes one checkpoint."""

    read: dict[str, str]
    estimate: Estimate
    perplexity: float | None
    sparsity: float
    seconds: dict[str, float]
    energy: dict[str, Joules]
    flops: dict[str, float]
    peak_memory: PeakMemory
    warnings: list[str]


class Measured(TypedDict):
    """How good a pruned model is on the evaluation text; None without one."""

    perplexity: float | None
    kl: float | None
    top1_agreement: float | None


class PruneRecord(CheckpointRecord, total=False):
    """The run.json of `espalier prune`."""

    compute: Compute
    shards: list[ShardRecord]
    dense_perplexity: float | None
    blocks: list[BlockReport]
    kl: float | None
    top1_agreement: float | None
    timeline: list[Span]
    versions: dict[str, str]


class RetrainRecord(CheckpointRecord, total=False):
    """The run.json of `espalier retrain`."""

    loss: float | None
    evaluations: list[tuple[int, float]]
    steps: int
    tokens: int
    tokens_per_second: float | None
    ranks: int
    memory: list[dict[str, int]]
    report: str


class TrackRecord(RunRecord, total=False):
    """The run.json of `espalier track`."""

    ranks: int
    metric: str
    unit: str
    trained: float
    points: list[TrackPoint]
    cost: dict[str, Cost]
    beside: dict[str, Any]
    seconds: float
    picture: str
    report: str
