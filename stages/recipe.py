"""What a run does to its blocks: plain data that travels from the driver to every shard."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from espalier.stages.criteria.scoring import find_criterion
from espalier.stages.layer_rules import LayerRule, Override, layer_rule
from espalier.stages.masks import Scope
from espalier.stages.refine import find_refinement


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How blocks are pruned. Exactly one of `sparsity`, `pattern` and `threshold` is set."""

    criterion: str = "wanda"
    criterion_options: Mapping[str, Any] = field(default_factory=dict)
    sparsity: float | None = 0.5
    pattern: tuple[int, int] | None = None
    threshold: float | None = None
    shadow: str | None = None  # the directory with the importances that some criteria score by
    scope: Scope | None = None  # None: rows, or what the criterion chooses among by itself
    overrides: tuple[Override, ...] = ()
    allocation: Literal["uniform", "owl"] = "uniform"  # how a sparsity is spread over the blocks
    refine: str = "none"  # a name of REFINEMENTS, in espalier.stages.refine, or "none"
    solve: bool = False  # the weights that stay get the values that are best for the mask, before any fit
    targets: Literal["plain", "corrected"] = "plain"  # of those values, and of ALPS': what the layer gave on what it
    # reads now, or what it gave in the dense model, so that it also takes back what those before it lost
    reconstruct: str = "component"  # a name of UNITS, in espalier.stages.reconstruction.units, or "none"
    blocks_per_unit: int = 1  # blocks reconstructed as one
    inputs: Literal["dense", "pruned"] = "dense"
    tolerance: float = 0.0  # relative error up to which a unit is left as it is
    epochs: int = 1
    batch: int = 2
    learning_rate: float = 0.4
    sweeps: int = 0  # further times that every unit is reconstructed, after the pruned model's activations
    corrections: tuple[float, ...] = ()  # of each sweep: the share of the accumulated error that a unit takes back;
    # none: every unit is given the input that it would have if the units before it had taken back theirs, and takes
    # back all that is then left
    seed: int = 0

    def rule(self, block: int, layer: str, sparsity: float | None) -> LayerRule:
        """How one layer is pruned, where `sparsity` is its block's."""
        default = LayerRule(
            criterion=self.criterion,
            criterion_options=self.criterion_options,
            sparsity=sparsity,
            pattern=self.pattern,
            threshold=self.threshold,
            scope=self.scope,
        )
        return layer_rule(self.overrides, block, layer, default)

    @property
    def criteria(self) -> frozenset[str]:
        """The names of its criteria: its own, and those of its overrides."""
        return frozenset({self.criterion, *(o.changes.get("criterion", self.criterion) for o in self.overrides)})

    @property
    def needs(self) -> frozenset[str]:
        """What its criteria and its refinement need beyond sums over the inputs: see `Criterion.needs`."""
        refinement = find_refinement(self.refine)
        of_criteria = (find_criterion(name).needs for name in self.criteria)
        needs = frozenset[str](refinement.needs if refinement else ()).union(*of_criteria)
        return needs | {"hessian"} if self.solve or self.corrected else needs

    @property
    def solves(self) -> bool:
        """Whether layers are given values that are the best for their mask, by `solve` or by their criterion."""
        moves = self.criterion_options.get("update", True)
        return self.solve or any(find_criterion(name).exact and moves for name in self.criteria)

    @property
    def corrected(self) -> bool:
        """Whether layers take back what those before them lost: then they are pruned in the order data passes them."""
        return self.targets == "corrected"

    @property
    def pruned_together(self) -> str:
        """What is scored and masked as one: the units that are reconstructed; where none is, components, or with
        corrected targets blocks, through which losses then travel no further than to the end."""
        return "block" if self.corrected and self.reconstruct == "none" else self.reconstruct

    @property
    def gathers(self) -> bool:
        """Whether statistics are gathered when a unit's turn comes, over its kept inputs, and not while its dense block
        is run: a block's Hessians are too large to wait side by side, and the pruned model's activations come last."""
        return self.sequential or "hessian" in self.needs

    @property
    def spares_held_out(self) -> bool:
        """Whether statistics leave out the samples that judge a fit: values that were solved on them would look better
        there than they are, and the fit that follows be put back."""
        return "hessian" in self.needs and self.reconstruct != "none"

    @property
    def compares(self) -> bool:
        """Whether the work needs the dense model's activations: not where it only scores with the pruned model's."""
        return not self.sequential or self.reconstruct != "none" or self.corrected

    @property
    def most_streams(self) -> int:
        """How often a sample travels from shard to shard at most: as the dense model has it, and as the pruned one."""
        return 2 if self.sweeps or (self.sequential and self.compares) else 1

    def sources(self, sweep: int) -> tuple[int | None, ...]:
        """Whose blocks carry the streams that reach a shard before its work of `sweep`: the dense model's (None), and
        beside it, for a later one, what the sweep before left."""
        return (None, sweep - 1) if sweep else (None,)

    @property
    def predicts_inputs(self) -> bool:
        """Whether a sweep's units read foreseen inputs rather than the pruned model's own; see
        `espalier.stages.reconstruction.target`."""
        return bool(self.sweeps) and not self.corrections

    @property
    def sequential(self) -> bool:
        """Whether a block needs the pruned blocks before it, so that blocks go in order."""
        return self.inputs == "pruned"


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockTask:
    """One piece of work: consecutive blocks that are reconstructed together, in one sweep."""

    blocks: tuple[int, ...]
    sweep: int = 0  # 0: from the dense blocks; then from what the sweep before left
    sparsity: tuple[float, ...] | None = None  # of each block, where it is not the recipe's


def derived_seed(*parts: object) -> int:
    """A seed of its own for each (run seed, block, component, sweep): the same wherever and whenever it is used."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def block_windows(blocks: range, blocks_per_unit: int) -> list[tuple[int, ...]]:
    """`blocks` cut into windows that start at multiples of `blocks_per_unit`, whatever the shard they are on."""
    cut: dict[int, list[int]] = {}
    for block in blocks:
        cut.setdefault(block // blocks_per_unit, []).append(block)
    return [tuple(members) for members in cut.values()]
