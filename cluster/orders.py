"""The queue of blocks to prune: which a shard has still to do, which it works on, which it writes to disk."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError

from espalier.cluster.connection.room import first_of
from espalier.cluster.shard_actor import ShardState
from espalier.cluster.streaming import answers
from espalier.stages.block_report import BlockReport
from espalier.stages.errors import DeviceLost, OutOfStep
from espalier.stages.recipe import BlockTask
from espalier.stages.shard.spec import ShardSpec

LOST = (OutOfStep, DeviceLost, RayActorError, ObjectLostError)  # what a restarted, dying or vanished shard looks like


class Orders:
    """Every shard has one order that it works on, and at most one before it that is being written meanwhile."""

    def __init__(self, specs: Sequence[ShardSpec], orders: Sequence[BlockTask]) -> None:
        self._todo = {spec.index: deque(o for o in orders if spec.first <= o.blocks[0] < spec.last) for spec in specs}
        self._working: dict[Any, tuple[int, BlockTask]] = {}
        self._writing: dict[Any, tuple[int, BlockTask]] = {}

    def __bool__(self) -> bool:
        """Whether anything is under way."""
        return bool(self._working or self._writing)

    @property
    def blocks(self) -> set[int]:
        """Those still to be worked on."""
        return {block for orders in self._todo.values() for order in orders for block in order.blocks}

    def start(self, actors: Sequence[Any]) -> None:
        """Give every shard that works on nothing its next order."""
        for shard in self._todo.keys() - {at_work for at_work, _ in self._working.values()}:
            if self._todo[shard]:
                order = self._todo[shard].popleft()
                self._working[actors[shard].work.remote(order)] = (shard, order)

    def step(self, actors: Sequence[Any]) -> list[BlockReport] | None:
        """What comes to an end next: the reports of blocks that are on disk; None for work, which is to be written now.

        Raises one of LOST, with the order to be done again, or what the shard refused.
        """
        done = first_of([*self._writing, *self._working])
        written = done in self._writing
        shard, order = (self._writing if written else self._working).pop(done)
        try:
            reports: list[BlockReport] | None = answers(done)
        except LOST:
            self._todo[shard].appendleft(order)
            raise
        if not written:
            self._writing[actors[shard].committed.remote(order)] = (shard, order)
        return reports

    def take_back(self, states: Sequence[ShardState]) -> None:
        """After a loss: what else was lost by now (a node takes all its shards along) is to be done again.

        What a lost shard had finished counts if it was on disk, and this was answered.
        """
        for tasks in (self._working, self._writing):
            for reference, (shard, order) in list(tasks.items()):
                over = bool(ray.wait([reference], timeout=0)[0])
                empty = not states[shard].open and (tasks is self._working or not over)
                if empty or (over and _is_lost(reference)):
                    del tasks[reference]
                    self._todo[shard].append(order)
        for shard, orders in self._todo.items():
            self._todo[shard] = deque(sorted(orders, key=lambda order: order.blocks))


def _is_lost(reference: Any) -> bool:
    """Whether a task that is over ended with the loss of its shard."""
    try:
        answers(reference)
    except LOST:
        return True
    return False
