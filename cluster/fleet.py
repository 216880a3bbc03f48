"""All shards of a run: opened together, streamed through, set to work, and brought back when one is lost.

Recompute, don't replicate: a lost actor comes back empty; the fleet opens it and streams the calibration through the
shards before it once more. Finished blocks stay finished.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from cluster.actor import ShardActor, ShardFacts
from stages.errors import OutOfStep, Refusal
from stages.shard import ShardSpec

LOST = (OutOfStep, RayActorError, ObjectLostError)  # what a restarted, dying or vanished shard looks like
FRUITLESS_RECOVERIES = 3  # in a row, with no block finished between them, before the run gives up

Answer = TypeVar("Answer")
Batches = Callable[[int], np.ndarray]  # microbatch number -> tokens (samples, length) int32


@dataclass(frozen=True, slots=True)
class Stream:
    """A pass of tokens through the shards."""

    batches: Batches
    microbatches: int
    window: int  # microbatches in flight at once


class Fleet:
    """The shard actors of one run. Use as a context manager: on leaving, the actors are ended."""

    def __init__(
        self, specs: Sequence[ShardSpec], threads: int, run_file: str | None, on_event: Callable[[str], None]
    ) -> None:
        self.specs = list(specs)
        self._on_event = on_event
        self._fruitless = 0
        gpus = 1 if specs[0].device.startswith("cuda") else 0
        options = ShardActor.options(num_cpus=threads, num_gpus=gpus, scheduling_strategy="SPREAD")
        self._actors: list[Any] = [options.remote(spec, threads, run_file) for spec in specs]

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(self, *exception: object) -> None:
        for actor in self._actors:
            ray.kill(actor, no_restart=True)

    def open(self, pruned: bool = False) -> list[ShardFacts]:
        """Every shard's tensors loaded, from the model or (its blocks) from the pruned output."""
        return self._get([actor.open.remote(pruned) for actor in self._actors])

    def calibrate(self, stream: Stream, blocks: set[int], on_step: Callable[[int], None]) -> None:
        """Stream the calibration, gathering it in `blocks`; what a lost shard had gathered is gathered again."""
        self._recovering(lambda: self._calibrate_missing(stream, blocks, on_step))

    def loss(self, stream: Stream, on_step: Callable[[int], None], pruned: bool = False) -> tuple[float, int]:
        """Summed negative log-likelihood in nats, and the number of tokens it counts; summed in stream order."""

        def attempt() -> tuple[float, int]:
            self._open_missing(pruned)
            losses = self._run(stream, len(self._actors), {}, "loss", on_step)
            return sum(loss for loss, _ in losses), sum(count for _, count in losses)

        return self._recovering(attempt)

    def work(self, stream: Stream, blocks: set[int]) -> Iterator[dict[str, Any]]:
        """Reports of `blocks` as they are finished, every shard on its own blocks in order, all shards at once."""
        todo = {spec.index: deque(b for b in range(spec.first, spec.last) if b in blocks) for spec in self.specs}
        running: dict[Any, tuple[int, int]] = {}

        def start(shard: int) -> None:
            if todo[shard]:
                block = todo[shard].popleft()
                running[self._actors[shard].work.remote(block)] = (shard, block)

        for shard in todo:
            start(shard)
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            shard, block = running.pop(done)
            try:
                report = self._get(done)
            except LOST as loss:
                todo[shard].appendleft(block)
                self._note(loss)
                self._recovering(lambda: self._gather_again(stream, todo, running))
                for idle in todo.keys() - {at_work for at_work, _ in running.values()}:
                    start(idle)
            else:
                self._fruitless = 0
                yield report
                start(shard)

    def _gather_again(self, stream: Stream, todo: dict[int, deque[int]], running: dict[Any, tuple[int, int]]) -> None:
        """After a loss: whatever else was lost by now (a node takes all its shards along) goes back to `todo`, and one
        pass gathers what the shards lack."""
        self._open_missing()  # answered once every shard is back, or done with its block
        over, _ = ray.wait(list(running), num_returns=len(running), timeout=0) if running else ([], [])
        for reference in over:
            try:
                self._get(reference)
            except LOST:
                shard, block = running.pop(reference)
                todo[shard].appendleft(block)
        self._calibrate_missing(stream, set().union(*todo.values()), lambda _: None)

    def copy_ends(self) -> dict[str, list[str]]:
        """Everything outside the blocks copied to the output: file -> tensor names."""

        def attempt() -> dict[str, list[str]]:
            self._open_missing()
            return self._get(self._actors[0].copy_ends.remote())

        return self._recovering(attempt)

    def record(self) -> list[tuple[int, list[dict[str, Any]]]]:
        """Each shard's peak memory in bytes and its phases."""
        return self._get([actor.record.remote() for actor in self._actors])

    # -- passes ----------------------------------------------------------------------------------------------------

    def _calibrate_missing(self, stream: Stream, blocks: set[int], on_step: Callable[[int], None]) -> None:
        self._open_missing()
        states = self._get([actor.state.remote() for actor in self._actors])
        wanted = {
            spec.index: missing
            for spec, (_, held) in zip(self.specs, states, strict=True)
            if (missing := {b for b in blocks if spec.first <= b < spec.last} - held)
        }
        if wanted:
            self._run(stream, max(wanted) + 1, wanted, "nothing", on_step)

    def _run(
        self, stream: Stream, shards: int, collect: dict[int, set[int]], wanted: str, on_step: Callable[[int], None]
    ) -> list[Any]:
        """One pass through the first `shards` shards; the last one's answers, in order."""
        actors = self._actors[:shards]
        begun = [actor.begin.remote(stream.microbatches, collect.get(i, set())) for i, actor in enumerate(actors)]
        self._get(begun)
        run = self._blockwise if self.specs[0].resident == "one" else self._pipelined
        return run(actors, stream, wanted, on_step)

    def _pipelined(self, actors: list[Any], stream: Stream, wanted: str, on_step: Callable[[int], None]) -> list[Any]:
        """Microbatches flow from shard to shard, at most `window` of them on the way."""

        def launch(microbatch: int) -> Any:
            tokens = source = stream.batches(microbatch)
            for actor in actors[:-1]:
                source = actor.forward.remote(microbatch, source, "hidden")
            targets = tokens if wanted == "loss" else None
            return actors[-1].forward.remote(microbatch, source, wanted, targets)

        return self._windowed(launch, stream, on_step)

    def _blockwise(self, actors: list[Any], stream: Stream, wanted: str, on_step: Callable[[int], None]) -> list[Any]:
        """Each shard takes all microbatches through its blocks, one block in memory, before the next shard starts."""
        for position, actor in enumerate(actors):

            def receive(microbatch: int, position: int = position, actor: Any = actor) -> Any:
                if position == 0:
                    return actor.receive.remote(microbatch, stream.batches(microbatch))
                return actor.receive.remote(microbatch, actors[position - 1].emit.remote(microbatch, "hidden"))

            self._windowed(receive, stream, on_step if position == 0 else lambda _: None)
            self._get(actor.advance.remote())

        def emit(microbatch: int) -> Any:
            targets = stream.batches(microbatch) if wanted == "loss" else None
            return actors[-1].emit.remote(microbatch, wanted, targets)

        return self._windowed(emit, stream, lambda _: None)

    def _windowed(self, launch: Callable[[int], Any], stream: Stream, on_step: Callable[[int], None]) -> list[Any]:
        flying: deque[Any] = deque()
        answers: list[Any] = []
        for microbatch in range(stream.microbatches):
            flying.append(launch(microbatch))
            while len(flying) >= stream.window or (flying and microbatch + 1 == stream.microbatches):
                answers.append(self._get(flying.popleft()))
                on_step(len(answers))
        return answers

    # -- losses ----------------------------------------------------------------------------------------------------

    def _open_missing(self, pruned: bool = False) -> None:
        states = self._get([actor.state.remote() for actor in self._actors])
        self._get(
            [actor.open.remote(pruned) for actor, (is_open, _) in zip(self._actors, states, strict=True) if not is_open]
        )

    def _recovering(self, attempt: Callable[[], Answer]) -> Answer:
        while True:
            try:
                return attempt()
            except LOST as loss:
                self._note(loss)

    def _note(self, loss: Exception) -> None:
        self._fruitless += 1
        if self._fruitless > FRUITLESS_RECOVERIES:
            raise Refusal(
                f"a shard was lost {self._fruitless} times with no block finished between ({_one_line(loss)}); "
                "likely out of memory: use more shards, --resident one or a smaller --spool-memory, then resume"
            )
        self._on_event(f"a shard was lost ({_one_line(loss)}); streaming to its replacement")

    @staticmethod
    def _get(references: Any) -> Any:
        try:
            return ray.get(references)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, Refusal | OutOfStep):
                raise cause from None
            raise


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
