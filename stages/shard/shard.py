"""A shard: some consecutive blocks of one model, and everything that is done with them. Plain torch, no Ray.

    shard = Shard(spec); shard.open()
    shard.begin(microbatches, collect=...)      then for each microbatch, in order:
    hidden = shard.forward(m, hidden)           resident "all": every block is in memory
    shard.receive(m, hidden); shard.advance(); hidden = shard.emit(m)      resident "one": one block at a time
    shard.work(order)                           score, mask, refine, reconstruct one block (or window of blocks)
    reports = shard.committed(order)            once it is on disk: written meanwhile, while the next is worked on

With dense inputs all shards work at once. With pruned inputs a shard receives the pruned model's activations, works
on its blocks in order, each of which carries them on, and emits them to the next shard.

The blocks that `forward` runs stay as they were loaded: work writes pruned copies, so a shard can always stream again.
"""

import functools
import gc
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from espalier.stages.allocation import outlier_share
from espalier.stages.block_report import BlockReport
from espalier.stages.criteria.scoring import score_rows
from espalier.stages.device_errors import out_of_memory_refused
from espalier.stages.devices import on_accelerator
from espalier.stages.errors import OutOfStep
from espalier.stages.loading.ends import copy_ends
from espalier.stages.loading.skeleton import Skeleton, read_config
from espalier.stages.loading.vision import SKELETONS
from espalier.stages.metrics.perplexity import Measures, measure
from espalier.stages.metrics.profile import Timeline
from espalier.stages.model.calls import LayerCalls
from espalier.stages.precision import COMPUTED, Compute, computing, named_dtype, own_compute, weights_dtype
from espalier.stages.recipe import BlockTask
from espalier.stages.shadow.store import Shadow
from espalier.stages.shard.block_cache import BlockCache
from espalier.stages.shard.block_pruner import BlockPruner
from espalier.stages.shard.calibration import BlockCalibration
from espalier.stages.shard.calibration_store import CalibrationStore
from espalier.stages.shard.commit import Commits
from espalier.stages.shard.hidden_states import HiddenStateBuffer, KeptStates
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


LESS_MEMORY = "use a smaller --microbatch, --resident one, more shards on more nodes, or fewer shards a node"


class Shard:
    def __init__(self, spec: ShardSpec) -> None:
        self.spec = spec
        self.timeline = Timeline()
        self._streamed: dict[int, tuple[int, float]] = {}  # block -> tokens of the last pass, and its seconds
        self.budget = SpoolBudget(spec.spool_memory)
        self._scratch = Path(spec.scratch) / f"shard-{spec.index}"
        self.kept = KeptStates(Path(spec.scratch) / "dense-states")
        self._expected = self._microbatches = 0
        self._carry: HiddenStateBuffer | None = None

    # -- loading ---------------------------------------------------------------------------------------------------

    def open(self, source: int | None = None) -> None:
        """Load what this shard owns: its blocks from the model, or as sweep number `source` left them."""
        spec = self.spec
        with self.timeline.phase("load"), torch.no_grad():
            if not hasattr(self, "skeleton"):
                self.skeleton, self.checkpoint = open_skeleton(spec, spec.model, spec.compute)
                self.blocks = BlockCache(spec, self.skeleton, self.checkpoint)
                self._calls = LayerCalls(self.skeleton.calls)
                self._commits = Commits(spec, self.skeleton, self.checkpoint, self.timeline)
                self.gathered = CalibrationStore(spec, self.skeleton, self._calls, self._scratch, self.budget)
                if spec.embeds or spec.heads:
                    self.skeleton.load_ends(self.checkpoint, embedding=spec.embeds, head=spec.heads)
            self._commits.wait()  # for what may be loaded
            self.blocks.open(source)

    @property
    def source(self) -> int | None:
        """Whose blocks `forward` runs: the model's (None), or those that a sweep left."""
        return self.blocks.source

    # -- the stream ------------------------------------------------------------------------------------------------

    def begin(
        self,
        microbatches: int,
        collect: Collection[int] = (),
        sweep: int = 0,
        varying: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Start a pass of so many microbatches, gathering in the blocks of `collect` that are ours what they need for
        `sweep`: their calibration for the first, what their units then read for a later one.

        `varying` holds, for all samples of the pass, those of their inputs that shape how blocks are called.
        """
        self._calls.begin(varying)
        self.skeleton.unload_vision()
        self._expected, self._microbatches = 0, microbatches
        self.gathered.begin(collect, sweep)
        self._streamed = dict.fromkeys(range(self.spec.first, self.spec.last), (0, 0.0))
        self._close_carry()

    def embed(self, inputs: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Tokens (samples, length) int, or all that the model takes of samples with images, or of images -> the first
        block's input (samples, length, hidden).

        What looks at images is in memory until the pass has embedded its last microbatch."""
        inputs = {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs
        if "pixel_values" in inputs and not self.skeleton.vision_loaded:
            with self.timeline.phase("load"), torch.no_grad():
                self.skeleton.load_vision(self.checkpoint)
        return self.skeleton.embed(inputs)

    def forward(self, microbatch: int, hidden: Tensor) -> Tensor:
        """This shard's blocks applied to one microbatch (samples, length, hidden), all in memory."""
        self._in_step(microbatch)
        for index in range(self.spec.first, self.spec.last):
            hidden = self._through(index, hidden)
        if microbatch + 1 == self._microbatches:
            self.gathered.end()
        return hidden

    def receive(self, microbatch: int, hidden: Tensor) -> None:
        """Take in one microbatch, for `advance` or for work with pruned inputs."""
        self._in_step(microbatch)
        if self._carry is None:
            self._carry = HiddenStateBuffer(self._scratch, self.budget, self.spec.first, self.spec.device)
        self._carry.receive(hidden)

    def advance(self) -> None:
        """Take all that was received through every block but the last, one block in memory at a time."""
        carry = self._full_carry(self.spec.first)
        for index in range(self.spec.first, self.spec.last - 1):
            with computing(self.blocks.hold([index])[index]):
                carry.advance(functools.partial(self._through, index), index + 1)

    def emit(self, microbatch: int) -> Tensor:
        """The last block's output for one microbatch."""
        if self._carry is None or self._carry.block < self.spec.last - 1:
            raise OutOfStep(f"shard {self.spec.index} has not advanced to its last block")
        if self._carry.block < self.spec.last:
            hidden = self._through(self.spec.last - 1, self._carry.on_device(microbatch))
        else:
            hidden = self._carry.microbatch(microbatch)
        if microbatch + 1 == self._microbatches:
            self._close_carry()
            self.gathered.end()
        return hidden

    def pass_on(self, blocks: Sequence[int], sweep: int) -> None:
        """Take all that was received, or came out of the block before, through blocks finished in `sweep`."""
        for index in blocks:
            carry = self._full_carry(index)
            block = self.blocks.load(index, sweep)
            with computing(block):
                carry.advance(functools.partial(self._run, index, block), index + 1)

    def _in_step(self, microbatch: int) -> None:
        if microbatch != self._expected:
            raise OutOfStep(f"shard {self.spec.index} expected microbatch {self._expected}, got {microbatch}")
        self._expected += 1
        if self._expected == self._microbatches:
            self.skeleton.unload_vision()

    def _full_carry(self, block: int) -> HiddenStateBuffer:
        held = len(self._carry) if self._carry is not None and self._carry.block == block else 0
        if self._carry is None or not held == self._microbatches > 0:
            raise OutOfStep(f"shard {self.spec.index} holds {held} of {self._microbatches} inputs of block {block}")
        return self._carry

    def _run(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        hidden = upload(hidden, self.spec.device)
        refused = out_of_memory_refused(
            f"block {index}, {hidden.shape[0]} x {hidden.shape[1]} tokens on {self.spec.device}", LESS_MEMORY
        )
        with refused, torch.no_grad(), computing(block):
            return self._calls.following(index, *hidden.shape[:2]).run(block, hidden)

    def _through(self, index: int, hidden: Tensor) -> Tensor:
        started = time.perf_counter()
        phase = "stream" if self.gathered.under_way else "evaluate"
        with self.timeline.phase(phase, index if self.spec.resident == "one" else None):
            block = self.blocks.hold([index])[index]
            with computing(block), self.gathered.watching(index, block):
                hidden = self._run(index, block, hidden)
        tokens, seconds = self._streamed.get(index, (0, 0.0))
        self._streamed[index] = tokens + hidden.shape[0] * hidden.shape[1], seconds + time.perf_counter() - started
        return hidden

    def calibrated(self) -> dict[int, int]:
        """The blocks whose calibration is here, whole, and the sweep whose inputs each of them holds (0: none)."""
        return self.gathered.sweeps()

    def _close_carry(self) -> None:
        if self._carry is not None:
            self._carry.close()
        self._carry = None

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

    def outlier_share(self, index: int) -> float:
        """What OWL weighs block `index` by, from Wanda's scores. Raises OutOfStep without its calibration."""
        calibration = self.gathered.whole(index)
        block = self.blocks.hold([index])[index]

        def scores() -> Iterator[Tensor]:
            for weight in calibration.anatomy.weights:
                matrix = weight.of(block.get_parameter(weight.parameter))
                yield from (part for _, part in score_rows("wanda", matrix, calibration.statistics[weight.name]))

        return outlier_share(scores)

    def work(self, order: BlockTask) -> None:
        """Prune and reconstruct the blocks of `order` (see `BlockPruner`), and hand them over to be written: see
        `committed`.

        With pruned inputs the blocks then carry what was received on, so they are worked on in order.
        Raises OutOfStep if what the stream leaves behind is not here, or not all of it, as after a restart; and what
        kept the blocks before from being written.
        """
        recipe = self.spec.recipe
        assert recipe is not None
        carry = self._full_carry(order.blocks[0]) if recipe.sequential else None
        if self.source != (order.sweep - 1 if order.sweep else None):
            raise OutOfStep(f"shard {self.spec.index} holds other blocks than sweep {order.sweep} starts from")
        if recipe.streams_dense:
            calibrations = {index: self.gathered.whole(index, order.sweep) for index in order.blocks}
        blocks = self.blocks.hold(order.blocks)
        if not recipe.streams_dense:
            calibrations = {index: self.gathered.of(index, block) for index, block in blocks.items()}
        samples = carry.samples if carry else None
        work = BlockPruner(
            recipe,
            order,
            blocks,
            calibrations,
            self.skeleton,
            self.timeline,
            self._new_spool,
            samples,
            self._importances(order, calibrations),
        )
        del blocks
        self.blocks.release()  # the dense blocks go, matrix by matrix, as their pruned copies are made
        beside = 0 if on_accelerator(self.spec.device) else work.training_bytes(self.spec.length)  # in the same memory
        self.gathered.make_room(beside)
        with self.budget.leaving(beside):
            work.run()
        self._commits.hand_over(work, dict(self._streamed))
        if carry:
            for index in order.blocks:
                with computing(work.modules[index]):
                    carry.advance(functools.partial(self._run, index, work.modules[index]), index + 1)
        if order.sweep == recipe.sweeps:
            for index in order.blocks:
                self.gathered.drop(index)
        if self.spec.resident == "one":
            del work
            gc.collect()  # modules hold themselves in cycles: without it dense blocks can be in memory still

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
