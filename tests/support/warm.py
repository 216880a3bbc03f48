"""One Ray cluster for the tests that share one, and shard processes in it that take up one run after the other.

A shard's process imports torch and transformers for seconds before a tiny run of less than one. What is as in a
ShardGroup of its own: the methods that are called, restarts, retries, what a restarted shard knows. What is not: a
process outlives its run, unless that ended in an error. Groups of their own are in tests/cluster and in every command
that a test starts in a process of its own.
"""

import contextlib
import gc
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import ray
from ray import cloudpickle

from espalier.cluster.connection.connect import local_cluster
from espalier.cluster.shard_actor import OPTIONS, ShardWorker
from espalier.cluster.shard_group import ShardGroup

CPUS = 4  # logical: what Ray may schedule, not cores
OBJECT_STORE_BYTES = 200 << 20
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers do not find modules of tests


class WarmWorker(ShardWorker):
    """What its run gave it is in the file `role`, for when it is killed: a restarted shard knows that, and no more."""

    def __init__(self, role: Path) -> None:
        self._role = role
        if role.exists():
            super().__init__(*cloudpickle.loads(role.read_bytes()))

    def take_up(self, *run: Any) -> None:
        self.leave()
        self._role.write_bytes(cloudpickle.dumps(run))
        super().__init__(*run)

    def leave(self) -> None:
        self._role.unlink(missing_ok=True)
        self._shard = None
        gc.collect()


class WarmShardGroup(ShardGroup):
    """A group of shards whose actors come from `idle`, and go back there if all went well."""

    idle: ClassVar[list[Any]] = []
    home: ClassVar[Path]

    def _started(self, threads: int, run_file: str | None) -> list[Any]:
        worker = ray.remote(max_restarts=-1, num_cpus=0, **OPTIONS)(WarmWorker)
        actors = []
        for spec in self.specs:
            role = self.home / f"{uuid.uuid4().hex}.pickle"
            actors.append(self.idle.pop(0) if self.idle else worker.remote(role))
            actors[-1].take_up.remote(spec, threads, run_file)
        return actors

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None:  # somebody may still be at work on what no longer counts
            return super().__exit__(*exception)
        for actor in self._actors:
            actor.leave.remote()
        self.idle[:0] = self._actors
        return None


@contextlib.contextmanager
def warm_cluster(home: Path) -> Iterator[None]:
    """A cluster of this process's own, and `home` for what its shards were given."""
    WarmShardGroup.home = home
    with local_cluster(cpus=CPUS, object_store_bytes=OBJECT_STORE_BYTES):
        try:
            yield
        finally:
            WarmShardGroup.idle.clear()
