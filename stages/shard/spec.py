"""What one shard owns, and where its results go."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from espalier.stages.model.families import Tower
from espalier.stages.precision import Compute
from espalier.stages.recipe import Recipe, block_windows

HOME = "espalier"  # a run's own directory inside its output


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
    tower: Tower = "language"  # whose blocks these are
    dtype: str = "auto"  # what weights are held and saved in; auto: each tensor as in its file
    compute: Compute | None = None  # what blocks are computed in; None: what most weights are stored in
    device: str = "cpu"
    resident: Literal["all", "one"] = "all"
    spool_memory: int = 1 << 30
    trust_remote_code: bool = False
    recipe: Recipe | None = None
    reference: str | None = None  # the model to compare with, where that is not this one before it was pruned
    reference_compute: Compute | None = None

    @property
    def block_windows(self) -> list[tuple[int, ...]]:
        """Its blocks, those together that are reconstructed together."""
        return block_windows(range(self.first, self.last), self.recipe.blocks_per_unit if self.recipe else 1)


def block_file(index: int) -> str:
    """The output file of one finished block."""
    return f"model-block-{index:05d}.safetensors"


def sweep_directory(output: Path, sweep: int, sweeps: int) -> Path:
    """Where the blocks of one sweep are written: the last one's are the result, the others' wait in the run's own."""
    return output if sweep == sweeps else output / HOME / f"sweep-{sweep}"
