"""What a shard's work takes of memory, phase by phase: bytes, from shapes alone.

The plan asks before any weight is read, a run before it fits; both here. Held to counted peaks: see
tests/benchmarks/README.md, Memory counted. What a phase takes counts beside the blocks that are worked on.

Letters: O = output rows, I = input columns, T = tokens, L = tokens of a sample, D = hidden size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from espalier.stages.criteria.equations import CPU_WEIGHTS, DEVICE_WEIGHTS
from espalier.stages.criteria.scoring import find_criterion
from espalier.stages.metrics.perplexity import HEAD_POSITIONS
from espalier.stages.recipe import Recipe
from espalier.stages.reconstruction.fit import STEPPED_AT_A_TIME
from espalier.stages.reconstruction.passes import PASS_TOKENS
from espalier.stages.reconstruction.shapes import UnitShape, joined
from espalier.stages.reconstruction.units import find_unit
from espalier.stages.refine import grow_and_prune, sparse_swaps
from espalier.stages.sparsegpt import DOUBLE_UP_TO
from espalier.stages.statistics import CPU_CHUNK, GRAM_TOKENS
from espalier.stages.storage.staging import SLAB, SLABS

MASTER_BYTES = 12  # a parameter: float32 master, two moments
PROCESSORS = 148  # multiprocessors of the largest GPU: so many copies of a gradient, if heads and samples are few
LANES = 4  # ways to a device and back that a process has: its own, what loads, what commits, with one more at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Arithmetic:
    """How a shard computes: bytes of a number as it is stored, as blocks compute and as they are fitted; tokens of a
    sample; whether on an accelerator, which takes more at a time."""

    stored: int
    item: int
    fitted: int
    length: int
    accelerator: bool


def work_bytes(recipe: Recipe, blocks: Sequence[Sequence[UnitShape]], arithmetic: Arithmetic) -> int:
    """What the most demanding phase takes while some blocks are worked on together; `blocks` has the components of
    each."""
    return max(masking_bytes(recipe, blocks, arithmetic), fitting_bytes(recipe, blocks, arithmetic))


# -- fits --------------------------------------------------------------------------------------------------------------


def fitting_bytes(recipe: Recipe, blocks: Sequence[Sequence[UnitShape]], arithmetic: Arithmetic) -> int:
    """The largest fit, with the masks of its group."""
    kind = find_unit(recipe.reconstruct)
    if kind is None:
        return 0
    return max(
        group.prunable + fit_bytes(unit, recipe.batch, arithmetic)
        for group in _groups(blocks, kind.whole_blocks)
        for unit in kind.fits(group)
    )


def _groups(blocks: Sequence[Sequence[UnitShape]], whole: bool) -> list[UnitShape]:
    """What is pruned together: blocks as a whole, or each of their components."""
    components = [component for block in blocks for component in block]
    return [joined(*components)] if whole else components


def fit_bytes(unit: UnitShape, batch: int, arithmetic: Arithmetic) -> int:
    """A fit: masters and working copy; the activations of a batch, and either what flows back through the widest layer
    or the step of the largest weight; the batch's first targets in float32."""
    tokens, item = batch * arithmetic.length, arithmetic.fitted
    flowing = max(
        tokens * item * unit.flowing + attention_bytes(batch, unit, arithmetic),
        step_bytes(unit.largest, arithmetic),
    )
    return (MASTER_BYTES + item) * unit.parameters + tokens * (item * unit.kept + 4 * unit.outputs) + flowing


def step_bytes(weights: int, arithmetic: Arithmetic) -> int:
    """A weight's gradient, and of what is stepped at a time it once more masked, and in float32 if it is not."""
    item = arithmetic.fitted
    at_once = weights if arithmetic.accelerator else min(weights, STEPPED_AT_A_TIME)
    return weights * item + at_once * (item + (4 if item < 4 else 0))


def attention_bytes(batch: int, unit: UnitShape, arithmetic: Arithmetic) -> int:
    """What attention's deterministic backward pass on an accelerator takes beyond its results: the queries' gradient in
    float32, in as many copies as fill the processors, and those of keys and values for each head."""
    if not arithmetic.accelerator or not unit.attention:
        return 0
    heads = batch * max(1, unit.attention // unit.head)
    copies = -(-PROCESSORS // heads)
    return batch * arithmetic.length * unit.attention * (4 * copies + 2 * arithmetic.fitted)


# -- statistics and masks ----------------------------------------------------------------------------------------------


def pass_bytes(components: Iterable[UnitShape], hidden: int, tokens: int, arithmetic: Arithmetic) -> int:
    """Activations of so many tokens on their way through a block, without a backward pass, and those of a sample that
    are summed in float32."""
    widest = max(max(component.passing + hidden, 9 * hidden) for component in components)
    return tokens * arithmetic.item * widest


def summing_bytes(inputs: int, arithmetic: Arithmetic, hessian: bool) -> int:
    """An input in float32, as its sums are taken: a sample of it, or what stays in a CPU's cache; for a Gram matrix a
    stretch of it."""
    tokens = arithmetic.length if arithmetic.accelerator else max(32, CPU_CHUNK // inputs)
    return 4 * inputs * max(tokens, GRAM_TOKENS if hessian else 0)


def gram_bytes(inputs: Iterable[int]) -> int:
    """Gram matrices of inputs so wide."""
    return 4 * sum(width**2 for width in inputs)


def masking_bytes(recipe: Recipe, blocks: Sequence[Sequence[UnitShape]], arithmetic: Arithmetic) -> int:
    """The most demanding group: its masks and Gram matrices, with the pass that fills these, or the method that finds
    the largest of those."""
    kind = find_unit(recipe.pruned_together)
    groups = _groups(blocks, kind is not None and kind.whole_blocks)
    phases = (gathering_bytes, finding_bytes)
    return max(phase(recipe, group, arithmetic) for group in groups for phase in phases)


def gathering_bytes(recipe: Recipe, group: UnitShape, arithmetic: Arithmetic) -> int:
    """The pass of the group's inputs that fills its statistics when its turn comes, through what it is cast to; with
    corrected targets beside the dense group."""
    if not recipe.gathers:
        return 0
    chains = 2 if recipe.corrected else 1
    cast = chains * arithmetic.item * group.parameters if arithmetic.stored != arithmetic.item else 0
    hessian = "hessian" in recipe.needs
    passing = max(PASS_TOKENS, arithmetic.length) * arithmetic.item * max(group.passing, 8 * group.outputs)
    summing = summing_bytes(max(group.inputs), arithmetic, hessian)
    beside = beside_bytes(recipe, group, arithmetic) if recipe.corrected else 0
    return statistics_bytes(recipe, group) + beside + cast + passing + summing


def beside_bytes(recipe: Recipe, group: UnitShape, arithmetic: Arithmetic) -> int:
    """What stays from mask to mask: those found so far; with corrected targets also the group as it was."""
    return group.prunable * (1 + arithmetic.stored if recipe.corrected else 1)


def statistics_bytes(recipe: Recipe, group: UnitShape) -> int:
    """Gram matrices of all that the group reads; with corrected targets one input's at a time, but for experts, and its
    cross sums with the dense model's."""
    if "hessian" not in recipe.needs:
        return 0
    if recipe.corrected and not group.experts:
        return 2 * gram_bytes((max(group.inputs),))
    return gram_bytes(group.inputs)


def finding_bytes(recipe: Recipe, group: UnitShape, arithmetic: Arithmetic) -> int:
    """The masks of the group, and what finds one, or replaces the tensor that it masks: its moved copy and its masked
    one (of experts, that of all of them)."""
    finding = max(method_bytes(recipe, *shape, arithmetic) for shape in set(group.matrices))
    copies = 2 if "hessian" in recipe.needs else 1
    replacing = copies * arithmetic.stored * group.largest
    return statistics_bytes(recipe, group) + beside_bytes(recipe, group, arithmetic) + max(replacing, finding)


def method_bytes(recipe: Recipe, outputs: int, inputs: int, arithmetic: Arithmetic) -> int:
    """What finding the mask of a matrix takes, its Gram matrix aside: by criterion, refinement and solution."""
    taken = [CRITERIA_BYTES.get(name, scores_bytes)(outputs, inputs, recipe, arithmetic) for name in recipe.criteria]
    if recipe.refine in REFINE_BYTES:
        taken.append(REFINE_BYTES[recipe.refine](outputs, inputs, recipe, arithmetic))
    if recipe.solve:
        taken.append(solve_bytes(outputs, inputs))
    return max(taken)


def scores_bytes(outputs: int, inputs: int, recipe: Recipe, arithmetic: Arithmetic) -> int:
    """Scores in float32 and what selects among them, some rows at a time; of a whole matrix, a sort of it."""
    weights = outputs * inputs
    if recipe.scope == "matrix" or not find_criterion(recipe.criterion).row_wise:
        return 16 * weights
    at_once = min(weights, DEVICE_WEIGHTS if arithmetic.accelerator else CPU_WEIGHTS)
    return weights + 11 * at_once


def dsnot_bytes(outputs: int, inputs: int, recipe: Recipe, arithmetic: Arithmetic) -> int:
    """Two masks and, some rows at a time, the weights in float32, unless they are, and two orders of them; relative
    weights take one more number."""
    weights = outputs * inputs
    if not arithmetic.accelerator:
        return 2 * weights + 20 * min(weights, grow_and_prune.CHUNK_ELEMENTS)
    numbers = (13 if arithmetic.stored < 4 else 9) + (4 if recipe.refine == "r2-dsnot" else 0)
    return 2 * weights + numbers * min(weights, grow_and_prune.ACCELERATOR_ELEMENTS)


def swaps_bytes(outputs: int, inputs: int, recipe: Recipe, arithmetic: Arithmetic) -> int:
    """Two masks and, some rows at a time, nine numbers a weight: the state of `Rows` and the costs that a round makes;
    sixteen in groups of N:M."""
    weights = outputs * inputs
    if not arithmetic.accelerator:
        return 2 * weights + 56 * min(weights, max(inputs, sparse_swaps.CHUNK_ELEMENTS))
    each = 65 if recipe.pattern else 36
    if weights > sparse_swaps.ACCELERATOR_ELEMENTS:
        each += 20  # of the rows before, while the next begin
    return 2 * weights + each * min(weights, sparse_swaps.ACCELERATOR_ELEMENTS)


def sparsegpt_bytes(outputs: int, inputs: int, recipe: Recipe, arithmetic: Arithmetic) -> int:
    """The Hessian and its factor: on the way to it that one again, reversed and factored, in float64 where it is small;
    then the weight, its errors and its result."""
    weights, square = outputs * inputs, inputs**2
    factoring = square * (24 if inputs <= DOUBLE_UP_TO else 16)
    return max(factoring, 8 * square + 14 * weights)


def alps_bytes(outputs: int, inputs: int, recipe: Recipe, arithmetic: Arithmetic) -> int:
    """The inverse of the scaled and shifted Hessian; eight or nine matrices as large as the weight, one more with
    corrected targets."""
    numbers = (34 if arithmetic.accelerator else 36) + (4 if recipe.corrected else 0)
    return 4 * inputs**2 + numbers * outputs * inputs


def solve_bytes(outputs: int, inputs: int) -> int:
    """The scaled Hessian, and what conjugate gradients hold: seven numbers a weight, and the mask."""
    return 4 * inputs**2 + 29 * outputs * inputs


CRITERIA_BYTES = {"sparsegpt": sparsegpt_bytes, "alps": alps_bytes}
REFINE_BYTES = {"dsnot": dsnot_bytes, "r2-dsnot": dsnot_bytes, "swaps": swaps_bytes}

# -- the ends of the model, and the host of a device -------------------------------------------------------------------


def logits_bytes(vocabulary: int) -> int:
    """Logits of some positions, once more in float32, and their logarithms."""
    return 21 * vocabulary * HEAD_POSITIONS // 2


def page_locked_bytes(tokens: int, hidden: int, arithmetic: Arithmetic) -> int:
    """The slabs of every way to the device and back; each as large as a batch of so many tokens, if that is larger."""
    return LANES * SLABS * max(SLAB, tokens * hidden * arithmetic.item)
