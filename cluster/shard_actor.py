"""The Ray actor around one shard. Every method fetches, calls the stage, hands back; none holds state of its own.

A restarted actor is an empty one: what it is then asked raises OutOfStep, and the group opens it and streams to it
again. So every method may be retried.
"""

import functools
import inspect
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import ray
import torch

from espalier.cluster.arithmetic import steady_products
from espalier.cluster.transport import pack, unpack
from espalier.stages.block_report import BlockReport
from espalier.stages.device_errors import context_lost
from espalier.stages.errors import DeviceLost, OutOfStep, Refusal, first_line
from espalier.stages.metrics.profile import Phase, peak_bytes
from espalier.stages.recipe import BlockTask
from espalier.stages.shard.hidden_states import Pass
from espalier.stages.shard.shard import Shard
from espalier.stages.shard.spec import ShardSpec

LINGER_SECONDS = 1.0  # from what a process says of its lost device to its end: until that has been sent
COMMITTING = "committing"  # the concurrency group that waits for blocks to be on disk

# Of a microbatch: its hidden states; its measures, with the hidden states kept, or compared with those kept; nothing.
Wanted = Literal["hidden", "measures", "kept", "compared", "nothing"]

Worker = TypeVar("Worker")

# A microbatch: tokens or hidden states, or all that a model takes of samples with images.
Inputs = np.ndarray | Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """Where a shard lives."""

    index: int
    first: int
    last: int
    node: str
    pid: int
    device: str


@dataclass(frozen=True, slots=True)
class ShardState:
    """What a shard has: nothing after a restart."""

    open: bool = False
    sources: tuple[int | None, ...] = ()  # whose blocks it holds: the model's (None), or those that a sweep left
    ready: tuple[int, int] | None = None  # the sweep, and the block, whose work can begin
    shares: frozenset[int] = frozenset()  # the blocks that OWL can weigh

    def can_start(self, sweep: int, block: int) -> bool:
        """Whether the shard has what it needs to work on `block`, whose turn comes next there, in `sweep`."""
        return self.ready is not None and self.ready[0] == sweep and self.ready[1] <= block


def _ends_with_its_device(worker: type[Worker]) -> type[Worker]:
    """`worker`, whose public methods raise DeviceLost where the process's device is lost to it; the next call ends the
    process, so that Ray makes another, in which that call is made again."""

    def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **options: Any) -> Any:
            if self.device_lost:
                time.sleep(LINGER_SECONDS)
                os._exit(1)
            try:
                return method(self, *args, **options)
            except RuntimeError as error:
                if not context_lost(error):
                    raise
                self.device_lost = True
                raise DeviceLost(f"{first_line(error)[:300]}, on node {socket.gethostname()}") from error

        return call

    for name, method in list(vars(worker).items()):
        if inspect.isfunction(method) and not name.startswith("_"):
            setattr(worker, name, guarded(method))
    return worker


@_ends_with_its_device
class ShardWorker:
    """What a shard's process does; `ShardActor` is this as a Ray actor."""

    device_lost = False  # to this process, for good

    def __init__(self, spec: ShardSpec, threads: int, run_file: str | None) -> None:
        steady_products()
        self._spec, self._threads, self._run_file = spec, threads, run_file
        self._shard: Shard | None = None

    @property
    def _open(self) -> Shard:
        if self._shard is None:
            raise OutOfStep(f"shard {self._spec.index} is not open")
        return self._shard

    def open(self, sources: Sequence[int | None] = (None,)) -> ShardFacts:
        """Load this shard's tensors, its blocks from the model (None) or as that sweep left them, or both.

        Raises Refusal if this node does not see the run's directory or its model.
        """
        torch.set_num_threads(self._threads)  # here: it counts in the thread that asks, and Ray makes one for methods
        spec = self._spec
        if self._run_file and not Path(self._run_file).exists():
            raise Refusal(
                f"{spec.output}: not visible on node {socket.gethostname()}; "
                "with several nodes --output must lie on storage that all of them share"
            )
        shard = self._shard or Shard(spec)
        shard.open(sources)
        self._shard = shard
        return ShardFacts(spec.index, spec.first, spec.last, _node(), os.getpid(), spec.device)

    def state(self) -> ShardState:
        shard = self._shard
        return ShardState() if shard is None else ShardState(True, shard.sources, shard.ready, shard.shares)

    def begin(self, this: Pass, varying: Mapping[str, np.ndarray] | None = None) -> None:
        self._open.begin(this, None if varying is None else _tensors(varying))

    def forward(self, microbatch: int, source: Inputs, wanted: Wanted, targets: np.ndarray | None = None) -> Any:
        """One microbatch, kept, or through all blocks, or both; `source` is the model's inputs for the shard that
        embeds, else hidden states."""
        hidden = self._open.forward(microbatch, self._hidden(source, self._spec.device))
        return self._answer(microbatch, hidden, wanted, targets)

    def receive(self, microbatch: int, source: Inputs) -> None:
        self._open.receive(microbatch, self._hidden(source))

    def advance(self) -> None:
        self._open.advance()

    def emit(self, microbatch: int, wanted: Wanted, targets: np.ndarray | None = None) -> Any:
        return self._answer(microbatch, self._open.emit(microbatch), wanted, targets)

    def pass_on(self, blocks: Sequence[int], sweep: int) -> None:
        self._open.pass_on(blocks, sweep)

    def outlier_share(self, block: int) -> float:
        return self._open.outlier_share(block)

    def work(self, order: BlockTask) -> None:
        self._open.work(order)

    @ray.method(concurrency_group=COMMITTING)
    def committed(self, order: BlockTask) -> list[BlockReport]:
        return self._open.committed(order)

    def keeps(self, microbatches: int) -> bool:
        """Whether the dense model's hidden states of so many microbatches are here."""
        return self._open.kept.holds(microbatches)

    def forget(self) -> None:
        if self._shard is not None:
            self._shard.kept.clear()

    def copy_ends(self) -> dict[str, list[str]]:
        return self._open.copy_ends()

    def record(self) -> tuple[int, list[Phase]]:
        """Peak memory in bytes, and the phases so far."""
        phases = [] if self._shard is None else self._shard.timeline.export()
        return peak_bytes(self._spec.device), phases

    def _hidden(self, source: Inputs, device: str = "cpu") -> torch.Tensor:
        if isinstance(source, np.ndarray):
            return self._open.embed(unpack(source)) if self._spec.embeds else unpack(source, device)
        return self._open.embed(_tensors(source))

    def _answer(self, microbatch: int, hidden: torch.Tensor, wanted: Wanted, targets: np.ndarray | None) -> Any:
        if wanted == "hidden":
            return pack(hidden)
        if wanted == "nothing":
            return None
        assert targets is not None
        shard = self._open
        if wanted == "kept":
            shard.kept.put(microbatch, hidden)
        return shard.measure(hidden, unpack(targets), shard.kept.get(microbatch) if wanted == "compared" else None)


def _tensors(inputs: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: unpack(values) for name, values in inputs.items()}


def _node() -> str:
    return ray.util.get_node_ip_address()


RESTARTS = 3  # of one actor; after that the group makes another, if blocks were finished meanwhile

# Methods run one after the other, but for `committed`, which waits beside them. Restarted wherever there is room, and
# asked again: the group counts the restarts that bring nothing.
OPTIONS: dict[str, Any] = {"max_task_retries": -1, "concurrency_groups": {COMMITTING: 1}}
ShardActor = ray.remote(max_restarts=RESTARTS, **OPTIONS)(ShardWorker)
