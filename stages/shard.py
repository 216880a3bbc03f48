"""A shard: some consecutive blocks of one model, and everything that is done with them. Plain torch, no Ray.

    shard = Shard(spec); shard.open()
    shard.begin(microbatches, collect=...)      then for each microbatch, in order:
    hidden = shard.forward(m, hidden)           resident "all": every block is in memory
    shard.receive(m, hidden); shard.advance(); hidden = shard.emit(m)      resident "one": one block at a time
    reports = shard.work(order)                 score, mask, refine, rebuild, commit one block (or window of blocks)

With dense inputs all shards work at once. With pruned inputs a shard receives the pruned model's activations, works
on its blocks in order, each of which carries them on, and emits them to the next shard.

The blocks that `forward` runs stay as they were loaded: work writes pruned copies, so a shard can always stream again.
"""

import functools
import gc
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.allocation import outlier_share
from stages.blocks import Call, trace
from stages.calibrate import BlockCalibration
from stages.carry import Carry
from stages.checkpoint import Checkpoint, grouped, resolve, write_tensors
from stages.criteria import score_rows
from stages.errors import OutOfStep
from stages.measure import KeptStates, Measures, measure
from stages.meter import Timeline, peak_bytes
from stages.recipe import WorkOrder
from stages.shadow_store import Shadow
from stages.skeleton import Skeleton, read_config
from stages.spec import ShardSpec, block_file, sweep_directory
from stages.spool import Spool, SpoolBudget
from stages.varying import Varying, inside
from stages.vision import SKELETONS
from stages.work import Work

TRACE_TOKENS = 4
ENDS_FILE_BYTES = 256 << 20


class Shard:
    def __init__(self, spec: ShardSpec) -> None:
        self.spec = spec
        self.timeline = Timeline()
        self.source: int | None = None  # whose blocks `forward` runs: the model's, or those that a sweep left
        self._blocks: dict[int, nn.Module] = {}
        self._calibrations: dict[int, BlockCalibration] = {}
        self._streamed: dict[int, tuple[int, float]] = {}  # block -> tokens of the last pass, and its seconds
        self._budget = SpoolBudget(spec.spool_memory)
        self._scratch = Path(spec.scratch) / f"shard-{spec.index}"
        self.kept = KeptStates(Path(spec.scratch) / "dense-states")
        self._expected = self._microbatches = self._sweep = 0
        self._collect: frozenset[int] = frozenset()
        self._varying: Varying | None = None
        self._carry: Carry | None = None
        self._calls_for: tuple[int, int] | None = None
        self._pieces = {block: piece for piece in spec.pieces for block in piece}

    # -- loading ---------------------------------------------------------------------------------------------------

    def open(self, source: int | None = None) -> None:
        """Load what this shard owns: its blocks from the model, or as sweep number `source` left them."""
        spec = self.spec
        with self.timeline.phase("load"), torch.no_grad():
            if not hasattr(self, "skeleton"):
                directory = resolve(spec.model)
                config = read_config(directory, spec.trust_remote_code)
                self.checkpoint = Checkpoint(directory)
                dtype = compute_dtype(config, spec.dtype)
                self.skeleton = SKELETONS[spec.tower](config, dtype, spec.device, self.checkpoint)
                if spec.embeds or spec.heads:
                    self.skeleton.load_ends(self.checkpoint, embedding=spec.embeds, head=spec.heads)
            self.source = source
            self._blocks.clear()
            if spec.resident == "all":
                self._hold(range(spec.first, spec.last))

    def _load_block(self, index: int, source: int | None) -> nn.Module:
        checkpoint = self.checkpoint
        if source is not None:
            assert self.spec.recipe is not None
            directory = sweep_directory(Path(self.spec.output), source, self.spec.recipe.sweeps)
            checkpoint = Checkpoint.of_file(directory / block_file(index))
        return self.skeleton.load_block(index, checkpoint)

    def _hold(self, blocks: Iterable[int]) -> dict[int, nn.Module]:
        """Those blocks, loaded if need be; with one block in memory at a time all others are let go."""
        if self.spec.resident == "one":
            for index in self._blocks.keys() - set(blocks):
                del self._blocks[index]
        for index in blocks:
            if index not in self._blocks:
                self._blocks[index] = self._load_block(index, self.source)
        return {index: self._blocks[index] for index in blocks}

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
        self._varying = Varying(varying, self.skeleton.calls) if varying else None
        self.skeleton.close_eyes()
        self._expected, self._microbatches, self._sweep = 0, microbatches, sweep
        self._collect = frozenset(collect) & set(range(self.spec.first, self.spec.last))
        for index in self._collect & self._calibrations.keys():
            if sweep:
                self._calibrations[index].begin_drift()
            else:
                self._calibrations.pop(index).close()
        self._streamed = dict.fromkeys(range(self.spec.first, self.spec.last), (0, 0.0))
        self._close_carry()

    def embed(self, inputs: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Tokens (samples, length) int, or all that the model takes of samples with images, or of images -> the first
        block's input (samples, length, hidden).

        What looks at images is in memory until the pass has embedded its last microbatch."""
        inputs = {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs
        if "pixel_values" in inputs and not self.skeleton.sees:
            with self.timeline.phase("load"), torch.no_grad():
                self.skeleton.open_eyes(self.checkpoint)
        return self.skeleton.embed(inputs)

    def forward(self, microbatch: int, hidden: Tensor) -> Tensor:
        """This shard's blocks applied to one microbatch (samples, length, hidden), all in memory."""
        self._in_step(microbatch)
        for index in range(self.spec.first, self.spec.last):
            hidden = self._through(index, hidden.to(self.spec.device))
        if microbatch + 1 == self._microbatches:
            self._finished_pass()
        return hidden

    def receive(self, microbatch: int, hidden: Tensor) -> None:
        """Take in one microbatch, for `advance` or for work with pruned inputs."""
        self._in_step(microbatch)
        if self._carry is None:
            self._carry = Carry(self._scratch, self._budget, self.spec.first)
        self._carry.receive(hidden)

    def advance(self) -> None:
        """Take all that was received through every block but the last, one block in memory at a time."""
        carry = self._full_carry(self.spec.first)
        for index in range(self.spec.first, self.spec.last - 1):
            carry.advance(functools.partial(self._through, index), index + 1)

    def emit(self, microbatch: int) -> Tensor:
        """The last block's output for one microbatch."""
        if self._carry is None or self._carry.block < self.spec.last - 1:
            raise OutOfStep(f"shard {self.spec.index} has not advanced to its last block")
        hidden = self._carry.microbatch(microbatch)
        if self._carry.block < self.spec.last:
            hidden = self._through(self.spec.last - 1, hidden)
        if microbatch + 1 == self._microbatches:
            self._close_carry()
            self._finished_pass()
        return hidden

    def pass_on(self, blocks: Sequence[int], sweep: int) -> None:
        """Take all that was received, or came out of the block before, through blocks finished in `sweep`."""
        for index in blocks:
            carry = self._full_carry(index)
            block = self._load_block(index, sweep)
            carry.advance(functools.partial(self._run, index, block), index + 1)

    def _in_step(self, microbatch: int) -> None:
        if microbatch != self._expected:
            raise OutOfStep(f"shard {self.spec.index} expected microbatch {self._expected}, got {microbatch}")
        self._expected += 1
        if self._expected == self._microbatches:
            self.skeleton.close_eyes()

    def _full_carry(self, block: int) -> Carry:
        held = len(self._carry) if self._carry is not None and self._carry.block == block else 0
        if self._carry is None or not held == self._microbatches > 0:
            raise OutOfStep(f"shard {self.spec.index} holds {held} of {self._microbatches} inputs of block {block}")
        return self._carry

    def _run(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        hidden = hidden.to(self.spec.device)
        with torch.no_grad():
            return self._next_call(index, *hidden.shape[:2]).run(block, hidden)

    def _through(self, index: int, hidden: Tensor) -> Tensor:
        started = time.perf_counter()
        phase = "stream" if self._collect else "evaluate"
        with self.timeline.phase(phase, index if self.spec.resident == "one" else None):
            block = self._hold([index])[index]
            with self._watching(index, block) if index in self._collect else nullcontext():
                hidden = self._run(index, block, hidden)
        tokens, seconds = self._streamed.get(index, (0, 0.0))
        self._streamed[index] = tokens + hidden.shape[0] * hidden.shape[1], seconds + time.perf_counter() - started
        return hidden

    def _watching(self, index: int, block: nn.Module) -> AbstractContextManager[None]:
        """What gathers from the block's passes what the sweep under way needs of them."""
        calibration = self._calibration(index, block)
        if not self._sweep:
            return calibration.watching(block)
        assert self.spec.recipe is not None
        return calibration.watching_drift(block, self.spec.recipe.foresees)

    def _next_call(self, index: int, samples: int, length: int) -> Call:
        """Block `index`'s call for so many samples, the next of the pass."""
        if self._varying is not None:
            return self._varying.next_call(index, samples)
        if self._calls_for != (samples, length):
            self._calls, self._calls_for = self.skeleton.calls(samples, length), (samples, length)
        return self._calls[index]

    def _calibration(self, index: int, block: nn.Module) -> BlockCalibration:
        if index not in self._calibrations:
            recipe = self.spec.recipe
            assert recipe is not None
            # Fitting calls the components for whole samples, so it wants the call of a whole sample.
            length = self.spec.length if recipe.reconstruct != "none" or recipe.gathers else TRACE_TOKENS
            length = self.skeleton.positions(length, self._varying.first if self._varying else {})
            nothing = torch.zeros(
                1, length, self.skeleton.hidden_size, dtype=self.skeleton.dtype, device=self.spec.device
            )
            call = self._varying.call(index, length) if self._varying else self.skeleton.calls(1, length)[index]
            anatomy = trace(block, lambda: call.run(block, nothing), self.skeleton.layout)
            anatomy.calls = {name: inside(inner, call) for name, inner in anatomy.calls.items()}
            self._calibrations[index] = BlockCalibration(
                index, block, anatomy, call, recipe, self._pieces[index], self._scratch, self._budget
            )
        return self._calibrations[index]

    def calibrated(self) -> dict[int, int]:
        """The blocks whose calibration is here, whole, and the sweep whose inputs each of them holds (0: none)."""
        return {index: c.drifted_for for index, c in self._calibrations.items() if c.complete}

    def _finished_pass(self) -> None:
        for index in self._collect:
            if not self._calibrations[index].keeps_alike:
                raise OutOfStep(f"shard {self.spec.index} kept part of the samples in sweep {self._sweep}")
            self._calibrations[index].complete = True
            self._calibrations[index].drifted_for = self._sweep

    def _close_carry(self) -> None:
        if self._carry is not None:
            self._carry.close()
        self._carry = None

    # -- evaluation ------------------------------------------------------------------------------------------------

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits (samples, length, vocabulary) from its last block's output."""
        return self.skeleton.logits(hidden.to(self.spec.device))

    def measure(self, hidden: Tensor, tokens: Tensor, dense: Tensor | None = None) -> Measures:
        """What the last block's output says of the windows' tokens, and how far it is from the dense model's output."""
        device = self.spec.device
        with self.timeline.phase("evaluate"), torch.no_grad():
            compared = None if dense is None else (self._dense.logits, dense.to(device))
            return measure(self.skeleton.logits, hidden.to(device), tokens.long().to(device), compared)

    @functools.cached_property
    def _dense(self) -> Skeleton:
        """What turns the dense model's hidden states into logits: its final norm and head, never its blocks."""
        if self.spec.reference is None:
            return self.skeleton
        directory = resolve(self.spec.reference)
        config, checkpoint = read_config(directory, self.spec.trust_remote_code), Checkpoint(directory)
        skeleton = Skeleton(config, compute_dtype(config, self.spec.dtype), self.spec.device, checkpoint)
        skeleton.load_ends(checkpoint, embedding=False)
        return skeleton

    # -- outside the blocks ----------------------------------------------------------------------------------------

    def copy_ends(self) -> dict[str, list[str]]:
        """Copy every tensor outside the blocks to the output, a few at a time: file -> tensor names."""
        files: dict[str, list[str]] = {}
        for position, group in enumerate(grouped(self.skeleton.outside(self.checkpoint), ENDS_FILE_BYTES)):
            file = f"model-ends-{position:05d}.safetensors"
            names = [entry.name for entry in group]
            write_tensors(Path(self.spec.output) / file, self.checkpoint.load(names, dtype=self.skeleton.dtype))
            files[file] = names
        return files

    # -- the work --------------------------------------------------------------------------------------------------

    def outlier_share(self, index: int) -> float:
        """What OWL weighs block `index` by, from Wanda's scores. Raises OutOfStep without its calibration."""
        calibration = self._calibrated(index)
        block = self._hold([index])[index]

        def scores() -> Iterator[Tensor]:
            for weight in calibration.anatomy.weights:
                matrix = weight.of(block.get_parameter(weight.parameter))
                yield from (part for _, part in score_rows("wanda", matrix, calibration.statistics[weight.name]))

        return outlier_share(scores)

    def _calibrated(self, index: int, sweep: int = 0) -> BlockCalibration:
        calibration = self._calibrations.get(index)
        if calibration is None or not calibration.complete or calibration.drifted_for != sweep:
            raise OutOfStep(f"shard {self.spec.index} has no calibration of sweep {sweep} for block {index}")
        return calibration

    def _make_room(self, training: int) -> None:
        """Move activations to disk, the last blocks' first, so that they and the fit together stay within the larger
        of the two's own bounds."""
        for index in sorted(self._calibrations, reverse=True):
            if self._budget.used + training <= max(training, self._budget.limit):
                return
            self._calibrations[index].spill()

    def work(self, order: WorkOrder) -> list[dict[str, Any]]:
        """Prune, rebuild and commit the blocks of `order`; a report of each (see `Work`).

        With pruned inputs the blocks then carry what was received on, so they are worked on in order.
        Raises OutOfStep if what the stream leaves behind is not here, or not all of it, as after a restart.
        """
        recipe = self.spec.recipe
        assert recipe is not None
        carry = self._full_carry(order.blocks[0]) if recipe.sequential else None
        if self.source != (order.sweep - 1 if order.sweep else None):
            raise OutOfStep(f"shard {self.spec.index} holds other blocks than sweep {order.sweep} starts from")
        if recipe.streams_dense:
            calibrations = {index: self._calibrated(index, order.sweep) for index in order.blocks}
        blocks = self._hold(order.blocks)
        if not recipe.streams_dense:
            calibrations = {index: self._calibration(index, block) for index, block in blocks.items()}
        samples = carry.samples if carry else None
        work = Work(
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
        if self.spec.resident == "one":
            self._blocks.clear()  # the dense blocks go, matrix by matrix, as their pruned copies are made
        self._make_room(work.training_bytes)
        work.run()
        reports = [report | self._commit(work, report) for report in work.reports()]
        if carry:
            for index in order.blocks:
                carry.advance(functools.partial(self._run, index, work.modules[index]), index + 1)
        if order.sweep == recipe.sweeps:
            for index in order.blocks:
                self._calibrations.pop(index).close()
        if self.spec.resident == "one":
            del work
            gc.collect()  # modules hold themselves in cycles: without it two blocks can be in memory
        return reports

    def _importances(
        self, order: WorkOrder, calibrations: Mapping[int, BlockCalibration]
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
        return Spool(self._scratch / f"{name}.arrow", self._budget)

    def _commit(self, work: Work, report: dict[str, Any]) -> dict[str, Any]:
        """Write one block; what its report is to say of that and of the stream."""
        started, index = time.perf_counter(), report["block"]
        directory = sweep_directory(Path(self.spec.output), work.order.sweep, work.recipe.sweeps)
        directory.mkdir(parents=True, exist_ok=True)
        with self.timeline.phase("commit", index):
            tensors = self.skeleton.stored(index, dict(work.modules[index].state_dict()))
            digest = write_tensors(directory / block_file(index), tensors)
        tokens, streamed = self._streamed.get(index, (0, 0.0))
        seconds = report["seconds"] | {"stream": streamed, "commit": time.perf_counter() - started}
        return {
            "tokens": tokens,
            "tokens_per_second": tokens / max(streamed, 1e-9),
            "seconds": seconds,
            "shard": self.spec.index,
            "file": block_file(index),
            "digest": digest,
            "peak_memory": peak_bytes(self.spec.device),
        }


def compute_dtype(config: Any, wanted: str) -> torch.dtype:
    """The dtype named, or the checkpoint's own for "auto" (float32 where its config names none)."""
    if wanted != "auto":
        return getattr(torch, wanted)
    return getattr(config, "dtype", None) or torch.float32
