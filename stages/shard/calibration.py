"""What the work on one block needs of the calibration: statistics per shared input, activations per unit."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.stages.allocation import outlier_share
from espalier.stages.criteria.scoring import score_rows
from espalier.stages.devices import on_accelerator
from espalier.stages.errors import Refusal
from espalier.stages.model.anatomy import Anatomy, Weight
from espalier.stages.model.calls import Call, first
from espalier.stages.model.hooks import activation_hooks
from espalier.stages.recipe import Recipe
from espalier.stages.reconstruction.fit import weight_rms
from espalier.stages.reconstruction.target import corrected_output
from espalier.stages.reconstruction.units import find_unit, groups_of
from espalier.stages.statistics import Check, InputStatistics, first_not_finite
from espalier.stages.storage.spool import Spool, SpoolBudget
from espalier.stages.storage.staging import upload


class BlockCalibration:
    """Filled by the forward passes made inside `watching`, in stream order; read by the block's work of `sweep`.

    `statistics`: weight name -> the statistics of its input, one object for all weights that read the same tensor.
    `inputs`, `outputs`: name of a source, or of a unit -> its dense inputs, its dense outputs, one record a sample.
    `drifted`: source -> its inputs in the pruned model, as the sweep before left it.
    What of these the recipe has no use for is not there. `piece` is the blocks that are reconstructed together with
    this one. `passing`: no work follows; a pass only looks ahead to what the blocks behind will read.
    """

    def __init__(
        self,
        index: int,
        block: nn.Module,
        anatomy: Anatomy,
        call: Call,
        recipe: Recipe,
        piece: tuple[int, ...],
        directory: Path,
        budget: SpoolBudget,
        sweep: int = 0,
        passing: bool = False,
    ) -> None:
        self.index, self.anatomy, self.call = index, anatomy, call
        self.statistics: dict[str, InputStatistics] = {}
        if not (recipe.gathers or sweep):
            self.statistics = new_statistics(anatomy, block, recipe.needs)
        dense = {} if passing else dict(block.state_dict())
        self.rms = {name: weight_rms(tensor) for name, tensor in dense.items() if tensor.ndim > 1}
        self._sources, self._results = _kept(index, anatomy, call, recipe, piece)
        if passing:
            self._results = {}
        opened = not recipe.predicts_inputs or anatomy.opens or "" in self._sources.values()
        self._entry = {} if opened else {"block": ""}  # kept in the pruned model, where no unit reads it as it is
        unit = find_unit(recipe.reconstruct)
        adding = sum(unit.adds for unit in anatomy.units)
        self._components_in_unit = adding * len(piece) if unit and unit.whole_blocks else 1
        self._foresees = recipe.predicts_inputs
        self._stem, self._budget = directory / f"{'passing' if passing else 'block'}-{index:05d}", budget
        self.inputs = self._spools(self._sources, "inputs")
        self.outputs = self._spools(self._results, "outputs")
        self.drifted = self._spools(self._entry | self._sources, "drifted") if sweep else {}

    def _spools(self, names: Mapping[str, str], kind: str) -> dict[str, Spool]:
        return {name: Spool(Path(f"{self._stem}-{name}.{kind}.arrow"), self._budget) for name in names}

    @property
    def drifted_entry(self) -> Spool:
        """The block's own inputs in the pruned model."""
        return next(iter(self.drifted.values()))

    def watching(self, stream: int, block: nn.Module) -> AbstractContextManager[None]:
        """Within it, each forward pass of `block` adds its samples: of the dense model's stream, number 0, or of the
        pruned one's, which comes behind it. The pass itself computes what it always does."""
        return self._watching_pruned(block) if stream else self._watching_dense(block)

    @contextmanager
    def _watching_dense(self, block: nn.Module) -> Iterator[None]:
        inputs, outputs = _appending(self._sources, self.inputs), _appending(self._results, self.outputs)
        count = Counting(self.statistics, block, f"calibration, block {self.index}") if self.statistics else None
        with activation_hooks(block, self.anatomy, count, inputs, outputs):
            yield
        if count is not None:
            count.settle()

    @contextmanager
    def _watching_pruned(self, block: nn.Module) -> Iterator[None]:
        """Only the units' inputs are kept. Where they are foreseen, each pass gives what the block will give once its
        units, and those before, have taken back their share of the error; see
        `espalier.stages.reconstruction.target`."""
        keepers = _appending(self._entry | self._sources, self.drifted)
        with ExitStack() as hooked:
            for names in self._reading_alike() if self._foresees else ():
                last = next((unit.modules[-1] for unit in self.anatomy.units if unit.name == names[-1]), "")
                keep, correct = self._correcting(names[-1], None if last else self.anatomy.hidden)
                keepers[self._sources[names[-1]]].append(keep)
                hooked.callback(block.get_submodule(last).register_forward_hook(correct).remove)
            hooked.enter_context(activation_hooks(block, self.anatomy, None, keepers))
            yield

    def _reading_alike(self) -> list[list[str]]:
        """The units that add to the stream and whose inputs are kept, those together that read one tensor and add to it
        side by side."""
        parallel = [unit.name for unit in self.anatomy.units if unit.parallel and unit.name in self._sources]
        others = {unit.name for unit in self.anatomy.units if not unit.adds}.union(parallel)
        return [*([parallel] if parallel else []), *([name] for name in self._sources if name not in others)]

    def _correcting(self, name: str, hidden: int | None) -> tuple[Callable[[Tensor], None], Callable[..., Any]]:
        """What sees the input of the unit of that name, and the hook that then corrects its output: that many columns
        of it, where not all are hidden states."""
        seen: list[Tensor] = []
        drifted, dense = self.drifted[name], self.inputs[name]

        def correct(module: nn.Module, args: Any, output: Any) -> Any:
            given, end = seen.pop(), len(drifted)
            read = upload(dense.batch(list(range(end - len(given), end))), given.device)
            gave = first(output)
            own = hidden or gave.shape[-1]
            corrected = corrected_output(gave[..., :own], given[..., :own], read[..., :own], self._components_in_unit)
            corrected = torch.cat((corrected, gave[..., own:]), dim=-1) if hidden else corrected
            return (corrected, *output[1:]) if isinstance(output, tuple) else corrected

        return seen.append, correct

    @property
    def _all(self) -> list[Spool]:
        return [*self.inputs.values(), *self.outputs.values(), *self.drifted.values()]

    @property
    def disk_bytes(self) -> int:
        return sum(spool.disk_bytes for spool in self._all)

    def spill(self) -> None:
        """Move the activations to disk."""
        for spool in self._all:
            spool.spill()

    def close(self) -> None:
        """Free the activations, in memory and on disk. What comes after it starts with none."""
        for spool in self._all:
            spool.close()


def _kept(
    index: int, anatomy: Anatomy, call: Call, recipe: Recipe, piece: tuple[int, ...]
) -> tuple[dict[str, str], dict[str, str]]:
    """Of which modules of block `index` the inputs, and of which the outputs are kept: name -> module."""
    groups = groups_of({index: anatomy}, {index: call}, recipe.pruned_together)
    fits = [unit for group in groups for unit in group.fits] if recipe.reconstruct != "none" else []
    gathered = recipe.gathers and (recipe.corrected or not recipe.sequential)
    read = [*fits, *(group.whole for group in groups if gathered)]
    sources = {unit.source: unit.steps[0].module for unit in read if index == piece[0]}
    return sources, {unit.name: unit.steps[-1].module for unit in fits if index == piece[-1]}


def new_statistics(anatomy: Anatomy, block: nn.Module, needs: frozenset[str]) -> dict[str, InputStatistics]:
    """Weight name -> empty statistics; weights that read one tensor share them, unless their outputs count too."""
    made: dict[str, InputStatistics] = {}
    outputs = "outputs" in needs and "hessian" not in needs  # with a Hessian the outputs' norms follow from it
    for group in anatomy.shared_inputs:
        for weight in group:
            if weight is group[0] or outputs:
                rows, columns = weight.of(block.get_parameter(weight.parameter)).shape
                device = block.get_parameter(weight.parameter).device
                shared = InputStatistics(columns, "hessian" in needs, rows if outputs else None, device=device)
            made[weight.name] = shared
    return made


class OutlierSums:
    """Sums over what a block's weights read, of which OWL takes its share of outliers."""

    def __init__(self, index: int, block: nn.Module, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.statistics = new_statistics(anatomy, block, frozenset())
        self._where = f"calibration, block {index}"

    @contextmanager
    def watching(self, block: nn.Module) -> Iterator[None]:
        """Within it, each forward pass of `block` adds its samples."""
        count = Counting(self.statistics, block, self._where)
        with activation_hooks(block, self.anatomy, count):
            yield
        count.settle()

    def share(self, block: nn.Module) -> float:
        """What OWL weighs the block by, from Wanda's scores."""

        def scores() -> Iterator[Tensor]:
            for weight in self.anatomy.weights:
                matrix = weight.of(block.get_parameter(weight.parameter))
                yield from (part for _, part in score_rows("wanda", matrix, self.statistics[weight.name]))

        return outlier_share(scores)


class Counting:
    """What adds the tensors that some weights of `block` read to their statistics.

    On a CPU a tensor is checked before it is added. On an accelerator, where each check would hold the host up, those
    of a pass are settled together, by `settle`; however many experts and samples it had, the host waits once.
    """

    def __init__(self, statistics: Mapping[str, InputStatistics], block: nn.Module, where: str) -> None:
        self._statistics, self._block, self._where = statistics, block, where
        self._unchecked: list[tuple[str, Check]] = []  # of the pass, in its order, by the first weight's name

    def __call__(self, group: tuple[Weight, ...], x: Tensor) -> None:
        for weight in group:
            sums = self._statistics[weight.name]
            if sums.output_sum_sq is not None:  # X Wᵀ once more: what the module gives may hold a bias
                matrix = weight.of(self._block.get_parameter(weight.parameter))
                self._add(group[0].name, sums, x, nn.functional.linear(x, matrix))
            elif weight is group[0]:
                self._add(group[0].name, sums, x)

    def _add(self, name: str, sums: InputStatistics, x: Tensor, y: Tensor | None = None) -> None:
        if on_accelerator(x.device):
            check = sums.update_unchecked(x, y)
            if check is not None:
                self._unchecked.append((name, check))
            return
        with self._naming(name):
            sums.update(x, y)

    def settle(self) -> None:
        """The pass is over. Raises Refusal for the first tensor of it that holds a NaN or an infinity."""
        unchecked, self._unchecked = self._unchecked, []
        bad = first_not_finite([check for _, check in unchecked])
        if bad is not None:
            with self._naming(next(name for name, check in unchecked if check is bad)):
                bad.refuse()

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        try:
            yield
        except Refusal as refusal:
            raise Refusal(f"{self._where}, {name}: {refusal}") from None


def _appending(modules: Mapping[str, str], spools: Mapping[str, Spool]) -> dict[str, list[Callable[[Tensor], None]]]:
    """Module -> what keeps the tensors seen there."""
    keepers: dict[str, list[Callable[[Tensor], None]]] = {}
    for name, module in modules.items():
        keepers.setdefault(module, []).append(spools[name].append)
    return keepers
