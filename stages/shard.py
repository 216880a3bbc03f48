"""A shard: some consecutive blocks of one model, and everything that is done with them. Plain torch, no Ray.

    shard = Shard(spec); shard.open()
    shard.begin(microbatches, collect=...)      then for each microbatch, in order:
    hidden = shard.forward(m, hidden)           resident "all": every block is in memory
    shard.receive(m, hidden); shard.advance(); hidden = shard.emit(m)      resident "one": one block at a time
    report = shard.work(block)                  score, mask, fit, commit one block

The blocks that `forward` runs stay as they were loaded: work writes pruned copies, so a shard can always stream again.
"""

import gc
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stages.blocks import Call, trace
from stages.calibrate import BlockCalibration
from stages.checkpoint import Checkpoint, grouped, resolve, write_tensors
from stages.errors import OutOfStep
from stages.meter import Timeline, peak_bytes
from stages.skeleton import Skeleton, read_config
from stages.spool import Spool, SpoolBudget
from stages.work import BlockWork, Recipe

TRACE_TOKENS = 4
ENDS_FILE_BYTES = 256 << 20
HEAD_POSITIONS = 256  # positions turned into logits at a time: a vocabulary of 128 k costs 0.1 GB, not 1 GB


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSpec:
    """What one shard owns and where it works. Blocks are `first` to `last`, `last` excluded."""

    index: int
    first: int
    last: int
    embeds: bool  # owns the input embedding
    heads: bool  # owns the final norm and the head
    model: str
    output: str
    scratch: str
    length: int
    dtype: str = "auto"
    device: str = "cpu"
    resident: Literal["all", "one"] = "all"
    spool_memory: int = 1 << 30
    trust_remote_code: bool = False
    recipe: Recipe | None = None


def block_file(index: int) -> str:
    """The output file of one finished block."""
    return f"model-block-{index:05d}.safetensors"


class Shard:
    def __init__(self, spec: ShardSpec) -> None:
        self.spec = spec
        self.timeline = Timeline()
        self._blocks: dict[int, nn.Module] = {}
        self._calibrations: dict[int, BlockCalibration] = {}
        self._stream_seconds: dict[int, float] = {}
        self._budget = SpoolBudget(spec.spool_memory)
        self._scratch = Path(spec.scratch)
        self._pruned = False
        self._expected = self._microbatches = 0
        self._collect: frozenset[int] = frozenset()
        self._carry: Spool | None = None
        self._carry_sizes: list[int] = []
        self._carry_of = 0

    # -- loading ---------------------------------------------------------------------------------------------------

    def open(self, pruned: bool = False) -> None:
        """Load what this shard owns: from the model, or with `pruned` its blocks from the output's finished files."""
        spec = self.spec
        with self.timeline.phase("load"), torch.no_grad():
            if not hasattr(self, "skeleton"):
                directory = resolve(spec.model)
                config = read_config(directory, spec.trust_remote_code)
                self.checkpoint = Checkpoint(directory)
                self.skeleton = Skeleton(config, compute_dtype(config, spec.dtype), spec.device, self.checkpoint)
                if spec.embeds or spec.heads:
                    self.skeleton.load_ends(self.checkpoint, embedding=spec.embeds, head=spec.heads)
            self._pruned = pruned
            self._blocks.clear()
            if spec.resident == "all":
                for index in range(spec.first, spec.last):
                    self._blocks[index] = self._load_block(index)

    def _load_block(self, index: int) -> nn.Module:
        source = self.checkpoint
        if self._pruned:
            source = Checkpoint.of_file(Path(self.spec.output) / block_file(index))
        return self.skeleton.load_block(index, source)

    def _block(self, index: int) -> nn.Module:
        if index not in self._blocks:
            if self.spec.resident == "one":
                self._blocks.clear()
            self._blocks[index] = self._load_block(index)
        return self._blocks[index]

    # -- the stream ------------------------------------------------------------------------------------------------

    def begin(self, microbatches: int, collect: Collection[int] = ()) -> None:
        """Start a pass of so many microbatches, gathering calibration in the blocks of `collect` that are ours."""
        self._expected, self._microbatches = 0, microbatches
        wanted = frozenset(collect) & set(range(self.spec.first, self.spec.last))
        for index in wanted:
            if index in self._calibrations:
                self._calibrations.pop(index).close()
        self._collect = wanted
        self._stream_seconds = dict.fromkeys(range(self.spec.first, self.spec.last), 0.0)
        self._close_carry()

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens (samples, length) int -> the first block's input (samples, length, hidden)."""
        return self.skeleton.embed(tokens.long())

    def forward(self, microbatch: int, hidden: Tensor) -> Tensor:
        """This shard's blocks applied to one microbatch (samples, length, hidden), all in memory."""
        self._in_step(microbatch)
        for index in range(self.spec.first, self.spec.last):
            hidden = self._through(index, hidden.to(self.spec.device))
        if microbatch + 1 == self._microbatches:
            self._finished_pass()
        return hidden

    def receive(self, microbatch: int, hidden: Tensor) -> None:
        """Take in one microbatch for `advance`."""
        self._in_step(microbatch)
        if self._carry is None:
            self._carry, self._carry_sizes, self._carry_of = self._new_carry(self.spec.first), [], self.spec.first
        self._carry.append(hidden)
        self._carry_sizes.append(len(hidden))

    def advance(self) -> None:
        """Take all that was received through every block but the last, one block in memory at a time."""
        if len(self._carry_sizes) != self._microbatches:
            raise OutOfStep(
                f"shard {self.spec.index} holds {len(self._carry_sizes)} of {self._microbatches} microbatches"
            )
        for index in range(self._carry_of, self.spec.last - 1):
            following = self._new_carry(index + 1)
            for microbatch in range(self._microbatches):
                following.append(self._through(index, self._carried(microbatch)))
            assert self._carry is not None
            self._carry.close()
            self._carry, self._carry_of = following, index + 1

    def emit(self, microbatch: int) -> Tensor:
        """The last block's output for one microbatch."""
        if self._carry is None or self._carry_of != self.spec.last - 1:
            raise OutOfStep(f"shard {self.spec.index} has not advanced to its last block")
        hidden = self._through(self.spec.last - 1, self._carried(microbatch))
        if microbatch + 1 == self._microbatches:
            self._close_carry()
            self._finished_pass()
        return hidden

    def _in_step(self, microbatch: int) -> None:
        if microbatch != self._expected:
            raise OutOfStep(f"shard {self.spec.index} expected microbatch {self._expected}, got {microbatch}")
        self._expected += 1

    def _through(self, index: int, hidden: Tensor) -> Tensor:
        started = time.perf_counter()
        phase = "stream" if self._collect else "evaluate"
        with torch.no_grad(), self.timeline.phase(phase, index if self.spec.resident == "one" else None):
            block = self._block(index)
            call = self._call(index, *hidden.shape[:2])
            if index in self._collect:
                with self._calibration(index, block).watching(block):
                    hidden = call.run(block, hidden)
            else:
                hidden = call.run(block, hidden)
        self._stream_seconds[index] = self._stream_seconds.get(index, 0.0) + time.perf_counter() - started
        return hidden

    def _call(self, index: int, samples: int, length: int) -> Call:
        if getattr(self, "_calls_for", None) != (samples, length):
            self._calls, self._calls_for = self.skeleton.calls(samples, length), (samples, length)
        return self._calls[index]

    def _calibration(self, index: int, block: nn.Module) -> BlockCalibration:
        if index not in self._calibrations:
            recipe = self.spec.recipe
            spool = recipe is not None and recipe.reconstruct != "none"
            # Fitting calls the components for whole samples, so it wants the call of a whole sample.
            length = self.spec.length if spool else TRACE_TOKENS
            nothing = torch.zeros(
                1, length, self.skeleton.hidden_size, dtype=self.skeleton.dtype, device=self.spec.device
            )
            call = self.skeleton.calls(1, length)[index]
            anatomy = trace(block, lambda: call.run(block, nothing), self.skeleton.layout)
            self._calibrations[index] = BlockCalibration(
                index, block, anatomy, self._scratch / f"shard-{self.spec.index}", self._budget, spool
            )
        return self._calibrations[index]

    def calibrated(self) -> set[int]:
        """The blocks whose calibration is here, whole."""
        return {index for index, calibration in self._calibrations.items() if calibration.complete}

    def _finished_pass(self) -> None:
        for index in self._collect:
            self._calibrations[index].complete = True

    def _new_carry(self, index: int) -> Spool:
        return Spool(self._scratch / f"shard-{self.spec.index}" / f"carry-{index:05d}.arrow", self._budget)

    def _carried(self, microbatch: int) -> Tensor:
        assert self._carry is not None
        start = sum(self._carry_sizes[:microbatch])
        return self._carry.batch(list(range(start, start + self._carry_sizes[microbatch]))).to(self.spec.device)

    def _close_carry(self) -> None:
        if self._carry is not None:
            self._carry.close()
        self._carry, self._carry_sizes = None, []

    # -- evaluation ------------------------------------------------------------------------------------------------

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits (samples, length, vocabulary) from its last block's output."""
        return self.skeleton.logits(hidden.to(self.spec.device))

    def negative_log_likelihood(self, hidden: Tensor, tokens: Tensor) -> tuple[float, int]:
        """Summed -log p of every token but each window's first, in nats, and how many tokens that is."""
        total, count = 0.0, 0
        with self.timeline.phase("evaluate"), torch.no_grad():
            for row, sample in zip(hidden.to(self.spec.device), tokens.long().to(self.spec.device), strict=True):
                for start in range(0, len(sample) - 1, HEAD_POSITIONS):
                    stop = min(start + HEAD_POSITIONS, len(sample) - 1)
                    logits = self.skeleton.logits(row[None, start:stop])[0].float()
                    loss = nn.functional.cross_entropy(logits, sample[start + 1 : stop + 1], reduction="none")
                    total += float(loss.sum(dtype=torch.float64))
                    count += stop - start
        return total, count

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

    def _make_room(self, training: int) -> None:
        """Move activations to disk, the last blocks' first, so that they and the fit together stay within the larger
        of the two's own bounds."""
        for index in sorted(self._calibrations, reverse=True):
            if self._budget.used + training <= max(training, self._budget.limit):
                return
            self._calibrations[index].spill()

    def work(self, index: int) -> dict[str, Any]:
        """Prune, rebuild and commit block `index`; its report (see `BlockWork`).

        Raises OutOfStep if the calibration stream has not (wholly) passed through the block, as after a restart.
        """
        calibration = self._calibrations.get(index)
        if calibration is None or not calibration.complete:
            raise OutOfStep(f"shard {self.spec.index} has no calibration for block {index}")
        assert self.spec.recipe is not None
        work = BlockWork(self.spec.recipe, index, self._block(index), calibration, self.skeleton, self.timeline)
        if self.spec.resident == "one":
            self._blocks.clear()  # the dense block goes, matrix by matrix, as its pruned copy is made
        with torch.no_grad():
            work.prune()
        if self.spec.recipe.reconstruct != "none":
            self._make_room(work.training_bytes)
            work.reconstruct()
        started = time.perf_counter()
        with self.timeline.phase("commit", index):
            path = Path(self.spec.output) / block_file(index)
            digest = write_tensors(path, self.skeleton.stored(index, work.tensors))
        self._calibrations.pop(index).close()
        if self.spec.resident == "one":
            gc.collect()  # modules hold themselves in cycles: without it two blocks can be in memory
        report = work.report()
        report["seconds"] |= {"stream": self._stream_seconds.get(index, 0.0), "commit": time.perf_counter() - started}
        report["tokens_per_second"] = report["tokens"] / max(report["seconds"]["stream"], 1e-9)
        peak = peak_bytes(self.spec.device)
        return report | {"shard": self.spec.index, "file": path.name, "digest": digest, "peak_memory": peak}


def compute_dtype(config: Any, wanted: str) -> torch.dtype:
    """The dtype named, or the checkpoint's own for "auto" (float32 where its config names none)."""
    if wanted != "auto":
        return getattr(torch, wanted)
    return getattr(config, "dtype", None) or torch.float32
