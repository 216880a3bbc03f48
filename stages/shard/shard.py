"""A shard: some consecutive blocks of one model, and everything that is done with them. Plain torch, no Ray.

    shard = Shard(spec); shard.open()
    shard.begin(Pass(...))                      then for each microbatch, in order:
    hidden = shard.forward(m, hidden)           resident "all": every block is in memory
    shard.receive(m, hidden); shard.advance(); hidden = shard.emit(m)      resident "one": one block at a time
    shard.work(order)                           score, mask, refine, reconstruct one block (or window of blocks)
    reports = shard.committed(order)            once it is on disk: written meanwhile, while the next is worked on

A pass of the calibration leaves behind in a shard what reaches its first block, and nothing else. The work starts from
there: it takes that through one block (or window) after the other, gathers what the block's own work needs, and goes on
with what the block gave. So a shard sets aside the activations of one block, however many it has. With dense inputs all
shards work at once. With pruned inputs what goes on is what the pruned block gives, so shards work one after the other.

The blocks that passes go through stay as they were loaded: work writes pruned copies, so a shard can always stream
again.
"""

import functools
import gc
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from espalier.stages.block_report import BlockReport
from espalier.stages.devices import on_accelerator
from espalier.stages.errors import OutOfStep
from espalier.stages.loading.ends import copy_ends
from espalier.stages.loading.skeleton import Skeleton, read_config
from espalier.stages.loading.vision import SKELETONS
from espalier.stages.metrics.perplexity import Measures, measure
from espalier.stages.metrics.profile import Timeline
from espalier.stages.precision import COMPUTED, Compute, computing, named_dtype, own_compute, weights_dtype
from espalier.stages.recipe import BlockTask, Recipe
from espalier.stages.shadow.store import Shadow
from espalier.stages.shard.block_cache import BlockCache, Source
from espalier.stages.shard.block_pruner import BlockPruner
from espalier.stages.shard.calibration import BlockCalibration
from espalier.stages.shard.commit import Commits
from espalier.stages.shard.hidden_states import HiddenStateBuffer, HiddenStreams, KeptStates, Pass, together
from espalier.stages.shard.passage import Passage
from espalier.stages.shard.spec import ShardSpec
from espalier.stages.storage.hf_checkpoint import Checkpoint, resolve
from espalier.stages.storage.spool import Spool, SpoolBudget
from espalier.stages.storage.staging import upload


def open_skeleton(spec: ShardSpec, model: str, compute: Compute | None) -> tuple[Skeleton, Checkpoint]:
    """The skeleton of `model`, seen as a shard is to see it, and its checkpoint."""
    directory = resolve(model)
    config, checkpoint = read_config(directory, spec.trust_remote_code), Checkpoint(directory)
    dtype = COMPUTED[compute or own_compute(weights_dtype(config, spec.dtype, checkpoint))]
    return SKELETONS[spec.tower](config, dtype, spec.device, checkpoint, named_dtype(spec.dtype)), checkpoint


class Shard:
    def __init__(self, spec: ShardSpec) -> None:
        self.spec = spec
        self.timeline = Timeline()
        self._streamed: dict[int, tuple[int, float]] = {}  # block -> tokens that calibrated it, and the seconds of that
        self.budget = SpoolBudget(spec.spool_memory)
        self._scratch = Path(spec.scratch) / f"shard-{spec.index}"
        self.kept = KeptStates(Path(spec.scratch) / "dense-states")
        self._pass, self._arrived, self._emitted = Pass(microbatches=0), 0, 0
        self._start: HiddenStreams | None = None  # what the work goes on from
        self._start_of = 0  # the sweep that it is for
        self._passing: HiddenStreams | None = None  # a pass on its way through the blocks, one at a time in memory
        self._passed = False  # the whole pass is through the blocks

    # -- loading ---------------------------------------------------------------------------------------------------

    def open(self, sources: Sequence[Source] = (None,)) -> None:
        """Load what this shard owns: its blocks from the model (None), or as that sweep left them; or both."""
        spec = self.spec
        with self.timeline.phase("load"), torch.no_grad():
            if not hasattr(self, "skeleton"):
                self.skeleton, self.checkpoint = open_skeleton(spec, spec.model, spec.compute)
                self.blocks = BlockCache(spec, self.skeleton, self.checkpoint, self.timeline)
                self.passage = Passage(spec, self.skeleton, self.blocks, self._scratch, self.budget, self.timeline)
                self._commits = Commits(spec, self.skeleton, self.checkpoint, self.timeline)
                if spec.embeds or spec.heads:
                    self.skeleton.load_ends(self.checkpoint, embedding=spec.embeds, head=spec.heads)
            self._commits.wait()  # for what may be loaded
            self.blocks.open(sources)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Whose blocks carry the streams of a pass: the model's (None), or those that a sweep left."""
        return self.blocks.sources

    # -- the stream ------------------------------------------------------------------------------------------------

    def begin(self, this: Pass, varying: Mapping[str, Tensor] | None = None) -> None:
        """Start a pass.

        `varying` holds, for all samples of the pass, those of their inputs that shape how blocks are called.
        """
        self.passage.begin(this, varying)
        self.skeleton.unload_vision()
        self._pass, self._arrived, self._emitted, self._passed = this, 0, 0, False
        self._drop_passing()
        if this.keeps is not None or this.phase == "evaluate":  # which comes before the work, or when it is done
            self._drop_start()
        if this.keeps is not None:
            self._start, self._start_of = self._new_streams("start"), this.keeps
            self._streamed = {}

    def _new_streams(self, name: str) -> HiddenStreams:
        def buffer(stream: int) -> HiddenStateBuffer:
            def spool(block: int) -> Spool:
                return self._new_spool(f"{name}-{stream}-{block:05d}")

            return HiddenStateBuffer(spool, self.spec.first, self.spec.device)

        return HiddenStreams([buffer(stream) for stream in range(self._pass.streams)], self._pass.microbatches)

    def embed(self, inputs: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Tokens (samples, length) int, or all that the model takes of samples with images, or of images -> the first
        block's input (samples, length, hidden), the same in every stream of the pass.

        What looks at images is in memory until the pass has embedded its last microbatch."""
        inputs = {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs
        if "pixel_values" in inputs and not self.skeleton.vision_loaded:
            with self.timeline.phase("load"), torch.no_grad():
                self.skeleton.load_vision(self.checkpoint)
        return together([self.skeleton.embed(inputs)] * self._pass.streams)

    def forward(self, microbatch: int, hidden: Tensor) -> Tensor:
        """One microbatch (streams · samples, length, hidden), kept where the pass says so, then through this shard's
        blocks, all in memory; as it came where it goes no further."""
        self._in_step(microbatch)
        if self._pass.keeps is not None:
            assert self._start is not None
            self._start.receive(hidden)
        if not self._pass.onward:
            return hidden
        for index in range(self.spec.first, self.spec.last):
            hidden = self.passage.through(index, hidden)
        self._passed = self._arrived == self._pass.microbatches
        return hidden

    def receive(self, microbatch: int, hidden: Tensor) -> None:
        """Take in one microbatch, for `advance` or for the work."""
        self._in_step(microbatch)
        if self._pass.keeps is None and self._passing is None:
            self._passing = self._new_streams("passing")
        receiver = self._start if self._pass.keeps is not None else self._passing
        assert receiver is not None
        receiver.receive(hidden)

    def advance(self) -> None:
        """Take all that was received through every block but the last, one block in memory at a time."""
        if self._pass.keeps is not None and self._passing is None:
            self._passing = self._new_streams("passing")
            self._passing.borrow(self._whole(self._start, self.spec.first))
        passing = self._whole(self._passing, self.spec.first)
        for index in range(self.spec.first, self.spec.last - 1):
            self.passage.carry_on(passing, index)

    def emit(self, microbatch: int) -> Tensor:
        """The last block's output for one microbatch; with pruned inputs what the pruned block gives."""
        given = self._passing if self._pass.onward else self._start
        if given is None or given.block < self.spec.last - self._pass.onward:
            raise OutOfStep(f"shard {self.spec.index} has not advanced to its last block")
        if microbatch != self._emitted:
            raise OutOfStep(f"shard {self.spec.index} was to emit microbatch {self._emitted}, not {microbatch}")
        self._emitted += 1
        if self._pass.onward:
            hidden = self.passage.through(self.spec.last - 1, together(given.on_device(microbatch)))
        else:
            hidden = given.microbatch(microbatch)
        if microbatch + 1 == self._pass.microbatches:
            self._passed = True
            self._drop_passing()
            if not self._pass.onward:
                self._drop_start()
        return hidden

    def pass_on(self, blocks: Sequence[int], sweep: int) -> None:
        """Take all that was received, or came out of the block before, through blocks finished in `sweep`: the pruned
        model's stream through them as they are now, the dense one's through the dense ones."""
        for index in blocks:
            start = self._whole(self._start, index)
            for number, buffer in enumerate(start.buffers):
                source = sweep if number + 1 == len(start.buffers) else None
                block = self.blocks.load(index, source)
                with computing(block):
                    buffer.advance(functools.partial(self.passage.run, index, block, number), index + 1)

    def _in_step(self, microbatch: int) -> None:
        if microbatch != self._arrived:
            raise OutOfStep(f"shard {self.spec.index} expected microbatch {self._arrived}, got {microbatch}")
        self._arrived += 1
        if self._arrived == self._pass.microbatches:
            self.skeleton.unload_vision()

    def _drop_passing(self) -> None:
        if self._passing is not None:
            self._passing.close()
        self._passing = None

    def _drop_start(self) -> None:
        if self._start is not None:
            self._start.close()
        self._start = None

    def _whole(self, streams: HiddenStreams | None, block: int | None = None) -> HiddenStreams:
        """`streams`, all of them, at `block` if one is given: a call that comes twice must not pass for the next."""
        if streams is None or not streams.whole:
            raise OutOfStep(f"shard {self.spec.index} holds {streams.said if streams else 'no inputs of its blocks'}")
        if block is not None and streams.block != block:
            raise OutOfStep(f"shard {self.spec.index} holds the inputs of block {streams.block}, not of block {block}")
        return streams

    # -- evaluation ------------------------------------------------------------------------------------------------

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits (samples, length, vocabulary) from its last block's output."""
        return self.skeleton.logits(upload(hidden, self.spec.device))

    def measure(self, hidden: Tensor, tokens: Tensor, dense: Tensor | None = None) -> Measures:
        """What the last block's output says of the windows' tokens, and how far it is from the dense model's output."""
        device = self.spec.device
        with self.timeline.phase("evaluate"), torch.no_grad():
            compared = None if dense is None else (self._dense.logits, upload(dense, device))
            return measure(self.skeleton.logits, upload(hidden, device), upload(tokens.long(), device), compared)

    @functools.cached_property
    def _dense(self) -> Skeleton:
        """What turns the dense model's hidden states into logits: its final norm and head, never its blocks."""
        if self.spec.reference is None:
            return self.skeleton
        skeleton, checkpoint = open_skeleton(self.spec, self.spec.reference, self.spec.reference_compute)
        skeleton.load_ends(checkpoint, embedding=False)
        return skeleton

    # -- outside the blocks ----------------------------------------------------------------------------------------

    def copy_ends(self) -> dict[str, list[str]]:
        """Copy every tensor outside the blocks to the output: file -> tensor names."""
        return copy_ends(self.skeleton, self.checkpoint, Path(self.spec.output))

    # -- the work --------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> tuple[int, int] | None:
        """The sweep whose work can begin here, and the block at which; None where what it starts from is not here."""
        return (self._start_of, self._start.block) if self._start is not None and self._start.whole else None

    @property
    def shares(self) -> frozenset[int]:
        """The blocks of which `outlier_share` can tell."""
        return self.passage.shares if self._passed else frozenset()

    def outlier_share(self, index: int) -> float:
        """What OWL weighs block `index` by. Raises OutOfStep before a pass with `shares` is through."""
        return self.passage.outlier_share(index)

    def gather(self, order: BlockTask) -> dict[int, BlockCalibration]:
        """What the work of `order` needs of its blocks, by block: what they read and give, as it is on its way through
        them to the next.

        Raises OutOfStep if what is to start from here is not here, as after a restart, or has gone on; and Refusal for
        a NaN or an infinity in it.
        """
        recipe, first = self._recipe, order.blocks[0]
        start = self._whole(self._start)
        if self._start_of != order.sweep or start.block > first or (recipe.sequential and start.block < first):
            raise OutOfStep(
                f"shard {self.spec.index} holds the inputs of block {start.block} for sweep {self._start_of}, not "
                f"those of block {first} for sweep {order.sweep}"
            )
        if self.sources != recipe.sources(order.sweep):
            raise OutOfStep(f"shard {self.spec.index} holds other blocks than sweep {order.sweep} starts from")
        for index in range(start.block, first):
            self.passage.carry_on(start, index)
        held = self.blocks.hold(order.blocks, self._after(order))
        calibrations = {index: self.passage.calibration(index, held[0][index], order.sweep) for index in order.blocks}
        for index, calibration in calibrations.items() if recipe.compares else ():
            started, wanted = time.perf_counter(), self._goes_on(index)
            tokens = self.passage.carry(start, index, held, calibration.watching, keep=wanted)
            self._streamed[index] = tokens, time.perf_counter() - started
        return calibrations

    def _goes_on(self, index: int) -> bool:
        """Whether somebody reads what block `index` gives: the next block here, or the next shard."""
        return index + 1 < self.spec.last or (self._recipe.sequential and not self.spec.heads)

    def _after(self, order: BlockTask) -> range:
        """The blocks whose turn is likely to come next."""
        first = order.blocks[-1] + 1
        return range(first, min(first + self._recipe.blocks_per_unit, self.spec.last))

    @property
    def _recipe(self) -> Recipe:
        assert self.spec.recipe is not None
        return self.spec.recipe

    def work(self, order: BlockTask) -> None:
        """Prune and reconstruct the blocks of `order` (see `BlockPruner`), and hand them over to be written: see
        `committed`. Orders come in the order of their blocks.

        With pruned inputs the pruned blocks then carry on what was received. Raises as `gather` does, and what kept
        the blocks before from being written.
        """
        recipe = self._recipe
        calibrations = self.gather(order)
        start = self._whole(self._start)
        pruned = start.buffers[-1]
        work = BlockPruner(
            recipe,
            order,
            self.blocks.hold(order.blocks, self._after(order))[-1],
            calibrations,
            self.skeleton,
            self.timeline,
            self._new_spool,
            pruned.samples if recipe.sequential else None,
            self._importances(order, calibrations),
        )
        self.blocks.release()  # the dense blocks go, matrix by matrix, as their pruned copies are made
        beside = 0 if on_accelerator(self.spec.device) else work.training_bytes(self.spec.length)  # in the same memory
        self._make_room(beside, [start, *reversed(calibrations.values())])
        with self.budget.leaving(beside):
            work.run()
        self._commits.hand_over(work, dict(self._streamed))
        for index in order.blocks if recipe.sequential else ():
            with computing(work.modules[index]):
                run = functools.partial(self.passage.run, index, work.modules[index], 1)
                pruned.advance(run, index + 1, self._goes_on(index))
        for calibration in calibrations.values():
            calibration.close()
        if self.spec.resident == "one":
            del work
            gc.collect()  # modules hold themselves in cycles: without it dense blocks can be in memory still

    def _make_room(self, beside: int, holding: Sequence[HiddenStreams | BlockCalibration]) -> None:
        """Move activations to disk, in the order of `holding`, so that they and work of `beside` bytes in one memory
        stay within the larger of the two's own bounds."""
        for each in holding:
            if self.budget.used + beside <= max(beside, self.budget.limit):
                return
            each.spill()

    def committed(self, order: BlockTask) -> list[BlockReport]:
        """A report of each block of `order`, which was worked on, once it is on disk. May be asked in any thread.

        Raises what kept it from there, and OutOfStep if it was not worked on, as after a restart.
        """
        return self._commits.reports(order)

    def _importances(
        self, order: BlockTask, calibrations: Mapping[int, BlockCalibration]
    ) -> dict[int, dict[str, Tensor]]:
        """What the recipe's shadow says of the matrices to be masked: block -> name inside it -> |q|."""
        recipe = self.spec.recipe
        if recipe is None or recipe.shadow is None or order.sweep or "importance" not in recipe.needs:
            return {}
        return {
            index: self._shadow.load(index, {weight.parameter for weight in calibration.anatomy.weights})
            for index, calibration in calibrations.items()
        }

    @functools.cached_property
    def _shadow(self) -> Shadow:
        assert self.spec.recipe is not None and self.spec.recipe.shadow is not None
        return Shadow(Path(self.spec.recipe.shadow), self.spec.device, self.spec.tower)

    def _new_spool(self, name: str) -> Spool:
        return Spool(self._scratch / f"{name}.arrow", self.budget)
