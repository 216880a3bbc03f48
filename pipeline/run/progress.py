"""Progress of a run, on stderr: bars with an ETA on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from espalier.cluster.connection.redact import without_secrets
from espalier.pipeline.reports.format import duration, number
from espalier.stages.block_report import BlockReport


class Reporter:
    """Plain lines on `console`; `TerminalReporter` adds bars."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._blocks_done = self._blocks_total = 0
        self._work_started = 0.0

    def note(self, text: str) -> None:
        """A line that matters to a person; what may not be shown is taken out of it."""
        self.console.print(without_secrets(text), highlight=False, soft_wrap=True)

    def pass_begins(self, name: str, microbatches: int) -> Callable[[int], None]:
        """A stream begins; call what comes back with the number of microbatches done."""
        tenth = max(1, microbatches // 4)
        started = time.perf_counter()

        def step(done: int) -> None:
            if done % tenth == 0 or done == microbatches:
                left = (time.perf_counter() - started) / done * (microbatches - done)
                eta = f"   eta {duration(left)}" if done < microbatches else ""
                self.note(f"{name:<14} {done}/{microbatches} microbatches{eta}")

        return step

    def work_begins(self, blocks_by_shard: Mapping[int, int], finished: int) -> None:
        """The shards set to work on so many blocks each; `finished` were finished by an earlier run."""
        self._blocks_done, self._blocks_total = 0, sum(blocks_by_shard.values())
        self._work_started = time.perf_counter()
        if finished:
            self.note(f"{finished} block{'s were' if finished > 1 else ' was'} finished before")

    def block_done(self, report: BlockReport, recipe: str, blocks: int) -> None:
        """A block is committed."""
        self._blocks_done += 1
        spent = time.perf_counter() - self._work_started
        left = spent / self._blocks_done * (self._blocks_total - self._blocks_done)
        eta = f"   eta {duration(left)}" if left else ""
        self.note(f"{block_line(report, recipe, blocks)}   {self._blocks_done}/{self._blocks_total} blocks{eta}")

    def close(self) -> None:
        """No more will be shown."""


class TerminalReporter(Reporter):
    """Live bars, one for the stream and one for each shard at work."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        columns = [TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        self._bars = Progress(*columns, console=console, transient=True)
        self._bars.start()
        self._shards: dict[int, TaskID] = {}

    def pass_begins(self, name: str, microbatches: int) -> Callable[[int], None]:
        task = self._bars.add_task(name, total=microbatches)

        def step(done: int) -> None:
            self._bars.update(task, completed=done, visible=done < microbatches)

        return step

    def work_begins(self, blocks_by_shard: Mapping[int, int], finished: int) -> None:
        super().work_begins(blocks_by_shard, finished)
        self._shards = {
            shard: self._bars.add_task(f"shard {shard}: blocks", total=count)
            for shard, count in blocks_by_shard.items()
        }

    def block_done(self, report: BlockReport, recipe: str, blocks: int) -> None:
        self._bars.advance(self._shards[report["shard"]])
        self.note(block_line(report, recipe, blocks))

    def close(self) -> None:
        self._bars.stop()


def reporter_for(console: Console) -> Reporter:
    """Bars if `console` is a terminal, lines otherwise."""
    return TerminalReporter(console) if console.is_terminal else Reporter(console)


def block_line(report: BlockReport, recipe: str, blocks: int) -> str:
    """`block 07   wanda 50 %   self_attn error 0.31 → 0.12   mlp error ...   4.8 s`; of so many blocks, from 0."""
    width = len(str(blocks - 1))
    errors = "".join(
        f"   {unit['name']} error {number(unit['error_before'], 3)}"
        + (f" → {number(unit['error_after'], 3)}" if unit["improved"] else " (kept)")
        for unit in report["units"]
    )
    seconds = sum(report["seconds"].values())
    return f"block {report['block']:0{width}}   {recipe}{errors}   {duration(seconds)}"
