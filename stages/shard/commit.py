"""Finished blocks written to disk in a thread of their own, while the next are worked on.

One piece of work is on its way at a time, so that its blocks and those being worked on are all the pruned copies that
there are. It is done when its files are: written, synced, read back, under their names.
"""

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from espalier.stages.block_report import BlockReport, WorkReport
from espalier.stages.devices import beside
from espalier.stages.errors import OutOfStep
from espalier.stages.loading.skeleton import Skeleton
from espalier.stages.metrics.profile import Timeline, peak_bytes
from espalier.stages.precision import as_saved
from espalier.stages.recipe import BlockTask
from espalier.stages.shard.block_pruner import BlockPruner
from espalier.stages.shard.spec import ShardSpec, block_file, sweep_directory
from espalier.stages.storage.files import clear_unfinished
from espalier.stages.storage.hf_checkpoint import Checkpoint, write_tensors

Reports = list[BlockReport]


class Commits:
    """What a shard has handed over to be written by a thread of its own, and was not asked for yet."""

    def __init__(self, spec: ShardSpec, skeleton: Skeleton, checkpoint: Checkpoint, timeline: Timeline) -> None:
        self._spec, self._skeleton, self._checkpoint, self._timeline = spec, skeleton, checkpoint, timeline
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._handed: dict[BlockTask, Future[Reports]] = {}
        self._last: Future[Reports] | None = None
        sweeps = spec.recipe.sweeps if spec.recipe else 0
        for sweep in range(sweeps + 1):
            directory = sweep_directory(Path(spec.output), sweep, sweeps)
            for index in range(spec.first, spec.last):  # a process before, that was killed, may have been writing them
                clear_unfinished(directory / block_file(index))

    def hand_over(self, work: BlockPruner, streamed: Mapping[int, tuple[int, float]]) -> None:
        """Have the blocks of `work` written, once what was handed over before is on disk; raises as `wait` does.

        `streamed`: block -> tokens of the pass that calibrated it, and its seconds, for the report.
        """
        finished = [(report, dict(work.modules[report["block"]].state_dict())) for report in work.reports()]
        directory = sweep_directory(Path(self._spec.output), work.order.sweep, work.recipe.sweeps)
        after_all_so_far = beside(self._spec.device)

        def write() -> Reports:
            reports = []
            with after_all_so_far():
                while finished:  # each let go of when it is written
                    report, tensors = finished.pop(0)
                    streams = streamed.get(report["block"], (0, 0.0))
                    reports.append(self._commit(directory, report, tensors, *streams))
            return reports

        self.wait()
        self._last = self._handed[work.order] = self._writer.submit(write)

    def wait(self) -> None:
        """Return when nothing is on its way any more. Raises what kept it from the disk."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def reports(self, order: BlockTask) -> Reports:
        """A report of each block of `order`, once they are on disk. Raises what kept them from it, and OutOfStep for an
        order that was not handed over here, or was asked for before."""
        handed = self._handed.pop(order, None)
        if handed is None:
            raise OutOfStep(f"blocks {order.blocks} of sweep {order.sweep} are not on their way to disk here")
        return handed.result()

    def _commit(
        self, directory: Path, report: WorkReport, tensors: dict[str, Tensor], tokens: int, streamed: float
    ) -> BlockReport:
        """Write one block; its report, with what there is to say of that and of the stream."""
        started, index = time.perf_counter(), report["block"]
        directory.mkdir(parents=True, exist_ok=True)
        with self._timeline.phase("commit", index):
            saved = as_saved(self._skeleton.stored(index, tensors), self._checkpoint, self._skeleton.weights)
            digest = write_tensors(directory / block_file(index), saved)
        return {
            **report,
            "tokens": tokens,
            "tokens_per_second": tokens / max(streamed, 1e-9),
            "seconds": report["seconds"] | {"stream": streamed, "commit": time.perf_counter() - started},
            "shard": self._spec.index,
            "file": block_file(index),
            "digest": digest,
            "peak_memory": peak_bytes(self._spec.device),
        }
