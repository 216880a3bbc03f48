"""Hidden states on their way through a shard's blocks: a microbatch, or all that a shard holds, block by block.

Each stream goes through the blocks of its own source: the dense model's, or those that a sweep left. What the work
needs is seen on the way.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from espalier.stages.device_errors import out_of_memory_refused
from espalier.stages.errors import OutOfStep
from espalier.stages.loading.skeleton import Skeleton
from espalier.stages.metrics.profile import Timeline
from espalier.stages.model.anatomy import Anatomy, trace
from espalier.stages.model.calls import Call, LayerCalls, inside
from espalier.stages.precision import computing
from espalier.stages.shard.block_cache import BlockCache
from espalier.stages.shard.calibration import BlockCalibration, OutlierSums
from espalier.stages.shard.hidden_states import HiddenStreams, Pass, together
from espalier.stages.shard.spec import ShardSpec
from espalier.stages.storage.spool import SpoolBudget
from espalier.stages.storage.staging import upload

TRACE_TOKENS = 4
LESS_MEMORY = "use a smaller --microbatch, --resident one, more shards on more nodes, or fewer shards a node"

Held = Sequence[Mapping[int, nn.Module]]  # for each source its blocks
Watch = Callable[
    [int, nn.Module], AbstractContextManager[None]
]  # of a stream's number and its block: sees a microbatch


class Passage:
    """The way through the blocks of `blocks`."""

    def __init__(
        self,
        spec: ShardSpec,
        skeleton: Skeleton,
        blocks: BlockCache,
        scratch: Path,
        budget: SpoolBudget,
        timeline: Timeline,
    ) -> None:
        self._spec, self._skeleton, self._blocks, self._timeline = spec, skeleton, blocks, timeline
        self._scratch, self._budget = scratch, budget
        self._calls = LayerCalls(skeleton.calls)
        self._pass = Pass(microbatches=0)
        self._windows = {block: window for window in spec.block_windows for block in window}
        self._foreseen: dict[int, BlockCalibration] = {}  # for the passes that foresee what blocks will read
        self._outliers: dict[int, OutlierSums] = {}

    def begin(self, this: Pass, varying: Mapping[str, Tensor] | None) -> None:
        """A pass begins, whose samples have these inputs that shape calls."""
        self._calls.begin(varying)
        self._pass, self._foreseen, self._outliers = this, {}, {}

    def run(self, index: int, block: nn.Module, stream: int, hidden: Tensor) -> Tensor:
        """`block`, as number `index`, applied to the next microbatch of the stream of that number."""
        hidden = upload(hidden, self._spec.device)
        refused = out_of_memory_refused(
            f"block {index}, {hidden.shape[0]} x {hidden.shape[1]} tokens on {self._spec.device}", LESS_MEMORY
        )
        with refused, torch.no_grad(), computing(block):
            return self._calls.following(index, len(hidden), hidden.shape[1], stream).run(block, hidden)

    def _seen(self, watch: Watch, index: int, block: nn.Module, stream: int, hidden: Tensor) -> Tensor:
        with watch(stream, block):
            return self.run(index, block, stream, hidden)

    def through(self, index: int, hidden: Tensor) -> Tensor:
        """One microbatch of the pass through block `index`."""
        made = []
        with self._timeline.phase(self._pass.phase, index if self._spec.resident == "one" else None):
            held = self._blocks.hold([index])
            with self._looking_on(index, held) as watch:
                for stream, (part, blocks) in enumerate(zip(hidden.chunk(len(held)), held, strict=True)):
                    with computing(blocks[index]):
                        made.append(self._seen(watch, index, blocks[index], stream, part))
        return together(made)

    def carry_on(self, streams: HiddenStreams, index: int) -> None:
        """All that is held at block `index` through it: in a pass, or where the block was finished before."""
        held = self._blocks.hold([index], self._next(index))
        with self._looking_on(index, held) as watch:
            self.carry(streams, index, held, watch, self._pass.phase)

    def _next(self, index: int) -> range:
        return range(index + 1, min(index + 2, self._spec.last))

    def carry(
        self,
        streams: HiddenStreams,
        index: int,
        held: Held,
        watch: Watch,
        phase: str = "stream",
        keep: bool = True,
    ) -> int:
        """All that is held at block `index` through it, seen by `watch`; with pruned inputs only the dense stream.
        Without `keep` nobody wants what comes out. Returns a stream's tokens."""
        tokens = 0
        with self._timeline.phase(phase, index):
            for stream, (buffer, blocks) in enumerate(zip(streams.buffers, held, strict=False)):
                run = functools.partial(self._seen, watch, index, blocks[index], stream)
                with computing(blocks[index]):
                    tokens = buffer.advance(run, index + 1, keep)
        return tokens

    # -- what is seen ----------------------------------------------------------------------------------------------

    @contextmanager
    def _looking_on(self, index: int, held: Held) -> Iterator[Watch]:
        """What sees the streams of a pass in the block: for OWL, or what foresees."""
        if not self._pass.shares:
            with self._foreseeing(index, held) as watch:
                yield watch
            return
        if index not in self._outliers:
            self._outliers[index] = OutlierSums(index, held[0][index], self._traced(index, held[0][index])[0])
        yield lambda stream, block: self._outliers[index].watching(block)

    @contextmanager
    def _foreseeing(self, index: int, held: Held) -> Iterator[Watch]:
        """What makes the pruned stream go on as it will once the block's units have taken back their share."""
        recipe = self._spec.recipe
        if recipe is None or not recipe.predicts_inputs or len(held) == 1:
            yield lambda stream, block: nullcontext()
            return
        if index not in self._foreseen:
            self._foreseen[index] = self.calibration(index, held[0][index], sweep=1, passing=True)
        yield self._foreseen[index].watching
        self._foreseen[index].close()

    @property
    def shares(self) -> frozenset[int]:
        """The blocks of which `outlier_share` can tell."""
        return frozenset(self._outliers)

    def outlier_share(self, index: int) -> float:
        """What OWL weighs block `index` by. Raises OutOfStep if the pass did not sum up what that hangs on."""
        if index not in self._outliers:
            raise OutOfStep(f"shard {self._spec.index} has not gathered what OWL weighs block {index} by")
        return self._outliers[index].share(self._blocks.hold([index])[0][index])

    def calibration(self, index: int, block: nn.Module, sweep: int, passing: bool = False) -> BlockCalibration:
        """An empty one of the dense block, for its work in `sweep`, or for a pass that foresees."""
        recipe = self._spec.recipe
        assert recipe is not None
        anatomy, call = self._traced(index, block)
        window, scratch, budget = self._windows[index], self._scratch, self._budget
        with computing(block):
            return BlockCalibration(index, block, anatomy, call, recipe, window, scratch, budget, sweep, passing)

    def _traced(self, index: int, block: nn.Module) -> tuple[Anatomy, Call]:
        """The anatomy of a block, and how it is called."""
        recipe, skeleton = self._spec.recipe, self._skeleton
        assert recipe is not None
        # Fitting calls the components for whole samples, so it wants the call of a whole sample.
        length = self._spec.length if recipe.reconstruct != "none" or recipe.gathers else TRACE_TOKENS
        length = skeleton.positions(length, self._calls.first)
        nothing = torch.zeros(1, length, skeleton.columns(index), dtype=skeleton.dtype, device=self._spec.device)
        call = self._calls.of_one(index, length)
        with computing(block):
            anatomy = trace(block, lambda: call.run(block, nothing), skeleton.layout)
        anatomy.calls = {name: inside(inner, call) for name, inner in anatomy.calls.items()}
        return anatomy, call
