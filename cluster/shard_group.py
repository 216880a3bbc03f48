"""All shards of a run: opened together, streamed through, set to work, and brought back when one is lost.

Recompute, don't replicate: a lost actor comes back empty; the group opens it and streams the calibration through the
shards before it once more. Finished blocks stay finished.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import ray
from ray.exceptions import ActorDiedError
from ray.util.placement_group import remove_placement_group

from espalier.cluster.connection.room import first_of, placed, reserved
from espalier.cluster.losses import cause_of, given_up
from espalier.cluster.orders import LOST, Orders
from espalier.cluster.shard_actor import RESTARTS, ShardActor, ShardFacts, ShardState
from espalier.cluster.streaming import Stream, answers, begin, blockwise, pipelined, receiving, windowed
from espalier.stages.block_report import BlockReport
from espalier.stages.errors import Refusal, first_line
from espalier.stages.metrics.perplexity import Measures
from espalier.stages.metrics.profile import Phase
from espalier.stages.recipe import BlockTask, Recipe
from espalier.stages.shard.hidden_states import Pass
from espalier.stages.shard.spec import ShardSpec

__all__ = ["ShardGroup", "Stream"]

FRUITLESS_RECOVERIES = 3  # in a row, with no block finished between them, before the run gives up

Answer = TypeVar("Answer")


class ShardGroup:
    """The shard actors of one run. Use as a context manager: on leaving, the actors are ended."""

    def __init__(
        self, specs: Sequence[ShardSpec], threads: int, run_file: str | None, on_event: Callable[[str], None]
    ) -> None:
        self.specs = list(specs)
        self._on_event = on_event
        self._recipe = specs[0].recipe
        self._fruitless = 0
        self._threads, self._run_file = threads, run_file
        self._room: Any = None  # what the cluster keeps for them
        self._actors: list[Any] = self._started(threads, run_file)

    def _started(self, threads: int, run_file: str | None) -> list[Any]:
        """An actor for each spec, neighbours close together. Raises Refusal if there is no room for all of them."""
        bundle = {"CPU": float(threads)} | ({"GPU": 1.0} if self.specs[0].device.startswith("cuda") else {})
        self._room = reserved(len(self.specs), bundle, "shards")
        return [self._actor_of(spec) for spec in self.specs]

    def _actor_of(self, spec: ShardSpec) -> Any:
        gpus = 1 if spec.device.startswith("cuda") else 0
        strategy = placed(self._room, spec.index)
        options = ShardActor.options(num_cpus=self._threads, num_gpus=gpus, scheduling_strategy=strategy)
        return options.remote(spec, self._threads, self._run_file)

    def __enter__(self) -> "ShardGroup":
        return self

    def __exit__(self, *exception: object) -> None:
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        if self._room is not None:
            remove_placement_group(self._room)

    def open(self) -> list[ShardFacts]:
        """Every shard's tensors loaded from the model. Raises Refusal for a shard whose process dies at every start."""

        def attempt() -> list[ShardFacts]:
            try:
                return answers([actor.open.remote() for actor in self._actors])
            except ActorDiedError as loss:
                raise Refusal(
                    f"a shard died before it was open, and so {RESTARTS} more times ({cause_of(loss)}); mend what is "
                    "said there, or, if nothing is, use more shards or --resident one: it may be out of memory"
                ) from None

        return self._recovering(attempt)

    def calibrate(self, stream: Stream, blocks: set[int], on_step: Callable[[int], None], sweep: int = 0) -> None:
        """Stream the calibration, so that each shard has what its work on `blocks` in `sweep` starts from; what a lost
        shard had is streamed to it again. Before a later sweep that is the dense model's activations beside the pruned
        one's."""
        self._recovering(lambda: self._calibrate_missing(stream, blocks, on_step, sweep))

    def measure(
        self,
        stream: Stream,
        on_step: Callable[[int], None],
        source: int | None = None,
        wanted: Literal["measures", "kept", "compared"] = "measures",
    ) -> Measures:
        """What is measured over the stream, summed in its order: of the dense model, or of the one that sweep number
        `source` left.

        "kept": the last shard keeps its hidden states. "compared": it compares with those kept, and lets them go;
        where they were lost, or an earlier process kept them elsewhere, a pass of the dense model makes them again.
        """

        def attempt() -> Measures:
            if wanted == "compared":
                self._keep_missing(stream)
            self._hold((source,))
            return sum(self._run(stream, wanted, on_step), Measures())

        measures = self._recovering(attempt)
        if wanted == "compared":
            answers(self._actors[-1].forget.remote())
        return measures

    def _keep_missing(self, stream: Stream) -> None:
        self._open_lost()
        if answers(self._actors[-1].keeps.remote(stream.microbatches)):
            return
        spec = self.specs[-1]
        if spec.reference is not None:
            raise Refusal(
                f"scratch {spec.scratch}: the last shard of {spec.model} does not see what {spec.reference} left; "
                "with several nodes --scratch must lie on storage that all of them share"
            )
        self._hold((None,))
        self._run(stream, "kept", lambda _: None)

    def outlier_shares(self, stream: Stream, blocks: Sequence[int]) -> list[float]:
        """What OWL weighs each of `blocks` by, from a pass through all of them. It also leaves with each shard what its
        work starts from, unless the pruned model's activations are to reach it first."""
        owned = [] if self._of_run.sequential else [spec.index for spec in self.specs]

        def attempt() -> list[float]:
            self._hold((None,))
            if not set(blocks) <= {block for state in self._states() for block in state.shares}:
                passes = self._passes(stream, len(self.specs) - 1, dict.fromkeys(owned, 0), shares=True)
                self._run(stream, "nothing", lambda _: None, passes)
            owners = {block: self._actors[spec.index] for spec in self.specs for block in range(spec.first, spec.last)}
            return answers([owners[block].outlier_share.remote(block) for block in blocks])

        return self._recovering(attempt)

    def work(self, stream: Stream, orders: Sequence[BlockTask]) -> Iterator[list[BlockReport]]:
        """Reports of `orders` as they are on disk, every shard on its own in order, all shards at once."""
        left, sweep = Orders(self.specs, orders), orders[0].sweep

        def gather() -> None:
            self._calibrate_missing(stream, left.blocks, lambda _: None, sweep)

        def gather_again() -> None:
            left.take_back(self._states())  # answered once every shard is back, or done with its order
            gather()

        self._recovering(gather)
        left.start(self._actors)
        while left:
            try:
                reports = left.step(self._actors)
            except LOST as loss:
                self._note(loss)
                self._recovering(gather_again)
            else:
                if reports is not None:
                    self._fruitless = 0
                    yield reports
            left.start(self._actors)

    def work_in_order(self, stream: Stream, orders: Sequence[BlockTask]) -> Iterator[list[BlockReport]]:
        """Reports of `orders` as they are on disk, block after block: each reads what the pruned blocks before it give.

        After a loss all is streamed once more, through the blocks finished by then. What no order is about is passed
        through in the same way, so a resumed run goes on as one that lost its shards.
        """
        left = {order.blocks: order for order in orders}
        while left:
            try:
                yield from self._one_after_another(stream, left)
            except LOST as loss:
                self._note(loss)

    def _one_after_another(self, stream: Stream, left: dict[tuple[int, ...], BlockTask]) -> Iterator[list[BlockReport]]:
        """One try at what is `left`, from which each order goes when it is on disk."""
        self._hold((None,))
        last = max(left)[0]
        writing: dict[Any, tuple[int, ...]] = {}

        def written_before(working: Any = None) -> Iterator[list[BlockReport]]:
            """Reports of what comes to be on disk before `working` is answered; without one, of all there is."""
            while writing and (done := first_of([*writing, *([] if working is None else [working])])) != working:
                reports = answers(done)
                self._fruitless = 0
                del left[writing.pop(done)]
                yield reports

        streams = self._of_run.most_streams
        this = Pass(microbatches=stream.microbatches, streams=streams, keeps=0, onward=False, phase="stream")
        begin(self._actors, stream, [this] * len(self._actors))
        for position, (spec, actor) in enumerate(zip(self.specs, self._actors, strict=True)):
            if spec.first > last:
                break
            windowed(receiving(self._actors, position, stream), stream, lambda _: None)
            for blocks in (blocks for blocks in spec.block_windows if blocks[0] <= last):
                if order := left.get(blocks):
                    working = actor.work.remote(order)
                    yield from written_before(working)
                    answers(working)
                    writing[actor.committed.remote(order)] = blocks
                else:
                    answers(actor.pass_on.remote(blocks, 0))
            yield from written_before()

    def copy_ends(self) -> dict[str, list[str]]:
        """Everything outside the blocks copied to the output: file -> tensor names."""

        def attempt() -> dict[str, list[str]]:
            self._open_lost()
            return answers(self._actors[0].copy_ends.remote())

        return self._recovering(attempt)

    def record(self) -> list[tuple[int, list[Phase]]]:
        """Each shard's peak memory in bytes and its phases."""
        return answers([actor.record.remote() for actor in self._actors])

    # -- passes ----------------------------------------------------------------------------------------------------

    def _calibrate_missing(
        self, stream: Stream, blocks: Collection[int], on_step: Callable[[int], None], sweep: int = 0
    ) -> None:
        """A pass after which each shard has what its work on those of `blocks` that are its own starts from."""
        self._hold(self._of_run.sources(sweep))
        states = self._states()
        lacking = {
            spec.index
            for spec, state in zip(self.specs, states, strict=True)
            if (own := set(blocks) & set(range(spec.first, spec.last))) and not state.can_start(sweep, min(own))
        }
        if lacking:
            last = max(lacking)
            self._run(stream, "nothing", on_step, self._passes(stream, last, dict.fromkeys(lacking, sweep)))

    def _passes(self, stream: Stream, last: int, keeps: Mapping[int, int], shares: bool = False) -> list[Pass]:
        """What the shards up to number `last` do in a pass of the calibration, of which some keep what reaches them for
        their work of that sweep."""
        sweep = max(keeps.values(), default=0)
        return [
            Pass(
                microbatches=stream.microbatches,
                streams=len(self._of_run.sources(sweep)),
                keeps=keeps.get(index),
                onward=shares or index < last,
                shares=shares,
                phase="stream",
            )
            for index in range(last + 1)
        ]

    @property
    def _of_run(self) -> Recipe:
        assert self._recipe is not None
        return self._recipe

    def _run(
        self, stream: Stream, wanted: str, on_step: Callable[[int], None], passes: Sequence[Pass] | None = None
    ) -> list[Any]:
        """One pass through as many shards as there are `passes`, or through all; the last one's answers, in order."""
        passes = passes or [Pass(microbatches=stream.microbatches)] * len(self._actors)
        actors = self._actors[: len(passes)]
        begin(actors, stream, passes)
        if self.specs[0].resident == "one":
            return blockwise(actors, stream, wanted, on_step, passes[-1].onward)
        return pipelined(actors, stream, wanted, on_step)

    # -- losses ----------------------------------------------------------------------------------------------------

    def _states(self) -> list[ShardState]:
        """What each shard has. One that is not restarted any more gets a successor, which has nothing."""
        states = []
        for position, asked in enumerate([actor.state.remote() for actor in self._actors]):
            try:
                states.append(answers(asked))
            except ActorDiedError:
                self._actors[position] = self._actor_of(self.specs[position])
                states.append(ShardState())
        return states

    def _open_lost(self) -> None:
        """Open the shards that came back empty."""
        pairs = zip(self._actors, self._states(), strict=True)
        answers([actor.open.remote() for actor, state in pairs if not state.open])

    def _hold(self, sources: tuple[int | None, ...]) -> None:
        """Every shard with the dense model's blocks (None), or with those that a sweep left, or both."""
        pairs = zip(self._actors, self._states(), strict=True)
        answers([actor.open.remote(sources) for actor, state in pairs if not state.open or state.sources != sources])

    def _recovering(self, attempt: Callable[[], Answer]) -> Answer:
        while True:
            try:
                return attempt()
            except LOST as loss:
                self._note(loss)

    def _note(self, loss: Exception) -> None:
        self._fruitless += 1
        if self._fruitless > FRUITLESS_RECOVERIES:
            raise Refusal(given_up(self._fruitless, loss))
        self._on_event(f"a shard was lost ({first_line(loss)}); streaming to its replacement")
