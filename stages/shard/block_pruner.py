"""The work on one block, or on a window of blocks: mask and reconstruct one unit after the other, then count.

What goes in is dense (or, in a later sweep, what the sweep before left), what comes out is pruned.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from types import MappingProxyType

import torch
from torch import Tensor, nn

from espalier.stages.block_report import LayerCount, UnitReport, WorkReport
from espalier.stages.device_errors import out_of_memory_refused
from espalier.stages.devices import on_accelerator
from espalier.stages.loading.skeleton import Skeleton
from espalier.stages.masks import count_zeros, masked
from espalier.stages.metrics.profile import Timeline, release_memory
from espalier.stages.model.anatomy import Closing
from espalier.stages.model.hooks import activation_hooks
from espalier.stages.precision import computing, fitted_in
from espalier.stages.recipe import BlockTask, Recipe, derived_seed
from espalier.stages.reconstruction.fit import FitSettings, fit, rate_unit, split_samples
from espalier.stages.reconstruction.passes import Place, UnitPasses, batches, portions
from espalier.stages.reconstruction.shapes import Routing, component_shapes
from espalier.stages.reconstruction.target import Target
from espalier.stages.reconstruction.units import FitUnit, Group, UnitModules, groups_of
from espalier.stages.shard.calibration import BlockCalibration
from espalier.stages.shard.gathering import Gathered, Stage, blocks_of, closing_of, gather, stages_of
from espalier.stages.shard.mask_selection import MaskSelector
from espalier.stages.shard.memory import Arithmetic, work_bytes
from espalier.stages.storage.spool import Spool

SWEEP_RATE = 0.4  # a sweep's learning rate, of the first fit's: the best of 0.25 to 1 on a trained model
LESS_MEMORY = {  # what takes less of it
    "mask": "use --resident one, fewer shards a node, or no Gram matrices (--criterion wanda --refine dsnot)",
    "reconstruct": "use a smaller --batch, --resident one, --reconstruct component or none, or fewer shards a node",
}


class _Reached(Exception):
    """Ends a pass at the module that was looked for."""


class BlockPruner:
    """One piece of work. `modules` holds the blocks as they are so far.

    `carried` is the pruned model's activations at the first block, where units are to read those; a sweep may foresee
    them. `spool` makes an empty spool of a name. `importances` are what a shadow says of the blocks' tensors, by block
    and name inside it.
    """

    def __init__(
        self,
        recipe: Recipe,
        order: BlockTask,
        blocks: Mapping[int, nn.Module],
        calibrations: Mapping[int, BlockCalibration],
        skeleton: Skeleton,
        timeline: Timeline,
        spool: Callable[[str], Spool],
        carried: Spool | None = None,
        importances: Mapping[int, Mapping[str, Tensor]] = MappingProxyType({}),
    ) -> None:
        self.recipe, self.order, self.calibrations = recipe, order, calibrations
        self.skeleton, self.timeline, self._spool, self._carried = skeleton, timeline, spool, carried
        if (
            recipe.predicts_inputs and order.sweep
        ):  # a unit after the first reads what those before it, reconstructed, make of it
            self._carried = calibrations[order.blocks[0]].drifted_entry
        self._importances = importances
        self.modules = {index: skeleton.assembled(index, dict(block.state_dict())) for index, block in blocks.items()}
        self.groups = groups_of(
            {index: calibration.anatomy for index, calibration in calibrations.items()},
            {index: calibration.call for index, calibration in calibrations.items()},
            recipe.pruned_together,
        )
        self.keep: dict[str, Tensor] = {}  # by block.parameter, in the parameter's own shape and orientation
        self.units: dict[int, list[UnitReport]] = {index: [] for index in blocks}
        self.seconds = {index: {"mask": 0.0, "reconstruct": 0.0} for index in blocks}
        ratios = order.sparsity or (recipe.sparsity,) * len(order.blocks)
        self.choosers = {
            index: MaskSelector(recipe, index, ratio) for index, ratio in zip(order.blocks, ratios, strict=True)
        }

    def training_bytes(self, length: int) -> int:
        """Memory that the most demanding phase takes, with samples of `length` tokens, as the plan has it."""
        routing = Routing.of(self.skeleton.config)
        blocks = [component_shapes(block, self.skeleton.layout, routing) for block in self.modules.values()]
        stored = max(tensor.element_size() for block in self.modules.values() for tensor in block.parameters())
        dtype = self.skeleton.dtype
        arithmetic = Arithmetic(
            stored=stored,
            item=dtype.itemsize,
            fitted=fitted_in(dtype).itemsize,
            length=length,
            accelerator=on_accelerator(self.skeleton.device),
        )
        return work_bytes(self.recipe, blocks, arithmetic)

    def _stored(self, block: int, parameter: str) -> Tensor:
        return self.modules[block].get_parameter(parameter).detach()

    def _put(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        self.modules[block].load_state_dict(tensors, strict=False, assign=True)
        self.modules[block].requires_grad_(False)

    def run(self) -> None:
        """Mask and reconstruct all units, each against its dense outputs."""
        for group in self.groups:
            with ExitStack() as held:
                captured: dict[str, Spool] = {}
                held.callback(_close, captured)
                with self._timed(group.whole, "mask"), torch.no_grad():
                    if self.order.sweep:
                        self._find_masks(group)
                    else:
                        self._mask(group, captured)
                if self.recipe.reconstruct != "none":
                    for unit in group.fits:
                        release_memory()  # or what the last step freed would count towards this one's peak
                        with self._timed(unit, "reconstruct"):
                            self._fit(unit, captured)
            self.keep.clear()

    @contextmanager
    def _timed(self, unit: FitUnit, what: str) -> Iterator[None]:
        started = time.perf_counter()
        refused = out_of_memory_refused(
            f"block {unit.first}, {what} of {unit.name} on {self.skeleton.device}", LESS_MEMORY[what]
        )
        with self.timeline.phase(what, unit.first), refused:
            yield
        self.seconds[unit.first][what] += time.perf_counter() - started

    # -- masks -----------------------------------------------------------------------------------------------------

    def _mask(self, group: Group, captured: dict[str, Spool]) -> None:
        """Score, mask and refine every prunable weight of the group; pruned weights become +0."""
        recipe, unit = self.recipe, group.whole
        anatomies = {block: self.calibrations[block].anatomy for block in blocks_of(unit)}
        stages = stages_of(unit, anatomies, recipe.corrected)
        if not recipe.gathers:
            for stage in stages:
                self._mask_stage(stage, {})
            return
        given = self._captured(unit, captured) if recipe.sequential else self._entry(unit).inputs[unit.source]
        samples = split_samples(len(given))[0] if recipe.spares_held_out else None
        with ExitStack() as held:
            passes, dense = UnitPasses(unit, self.modules, given), None
            if recipe.corrected:
                going_on = closing_of(stages[:-1], anatomies, self.modules)
                passes = UnitPasses(unit, self.modules, given, self._spool, going_on)
                held.callback(passes.close)
                # What an expert's pass through the whole of it sees is of use to the last stage, too.
                dense = self._dense(
                    unit, closing_of(stages, anatomies, self.modules) if stages[0].experts else going_on
                )
                held.callback(dense.close)
            as_dense = not recipe.sequential  # whether stages read what they do in the dense unit
            for stage in stages:
                on, beside = passes, None if stage.experts else dense  # an expert's tokens have no counterpart
                if dense is not None and as_dense:
                    on, beside, as_dense = dense, None, stage.experts
                gathered = gather(on, stage, recipe.needs, self.skeleton.device, beside, samples)
                self._mask_stage(stage, gathered)

    def _dense(self, unit: FitUnit, closing: Mapping[Place, Closing]) -> UnitPasses:
        """The unit as it is before any weight of it is pruned, and what it reads in the dense model."""
        modules = {
            block: self.skeleton.assembled(block, dict(self.modules[block].state_dict())) for block in blocks_of(unit)
        }
        inputs = self._entry(unit).inputs[unit.source]
        return UnitPasses(unit, modules, inputs, self._spool, closing, final=True)

    def _mask_stage(self, stage: Stage, gathered: Gathered) -> None:
        for (block, parameter), weights in stage.parameters().items():
            chooser = self.choosers[block]
            statistics = gathered.get(block) or self.calibrations[block].statistics
            stored = moved = self._stored(block, parameter)
            keep = torch.empty_like(stored, dtype=torch.bool)
            importance = self._importances.get(block, {}).get(parameter)
            for weight in weights:
                said = None if importance is None else weight.of(importance)
                kept, values = chooser.choose(weight, weight.of(stored), statistics[weight.name], said)
                weight.of(keep).copy_(kept)
                if values is not None and (values.dtype != torch.float16 or bool(torch.isfinite(values).all())):
                    moved = stored.clone() if moved is stored else moved
                    weight.of(moved).copy_(values)
                del kept, values  # or they would still be there while the next are found
            self.keep[f"{block}.{parameter}"] = keep
            self._put(block, {parameter: masked(moved, keep)})

    def _find_masks(self, group: Group) -> None:
        """The masks of an earlier sweep: what is zero stays zero."""
        for block, parameter in _parameters(group.whole):
            self.keep[f"{block}.{parameter}"] = self._stored(block, parameter) != 0

    # -- activations -----------------------------------------------------------------------------------------------

    def _entry(self, unit: FitUnit) -> BlockCalibration:
        return self.calibrations[unit.first]

    def _captured(self, unit: FitUnit, captured: dict[str, Spool]) -> Spool:
        """What reaches the unit when the first block's inputs, the pruned model's or foreseen, pass through the blocks
        as they are so far."""
        assert self._carried is not None
        module, entry = unit.steps[0].module, self._entry(unit)
        if not module:
            return self._carried
        if unit.source in captured:
            return captured[unit.source]
        spool = captured[unit.source] = self._spool(f"block-{unit.first:05d}-{unit.source}.captured")

        def reached(hidden: Tensor) -> None:
            spool.append(hidden)
            raise _Reached

        block = self.modules[unit.first]
        with torch.no_grad(), computing(block), activation_hooks(block, entry.anatomy, None, {module: [reached]}):
            numbers = portions(self._carried)
            for samples, (batch,) in zip(numbers, batches(numbers, self.skeleton.device, [self._carried]), strict=True):
                with suppress(_Reached):
                    entry.call.at(samples).run(block, batch)
        return spool

    def _activations(self, unit: FitUnit, captured: dict[str, Spool]) -> tuple[Spool, Target]:
        """What the unit reads while it is fitted, and what it is to give."""
        recipe, entry = self.recipe, self._entry(unit)
        outputs = self.calibrations[unit.last].outputs[unit.name]
        if self.order.sweep:
            given = self._captured(unit, captured) if recipe.predicts_inputs else entry.drifted[unit.source]
            correction = 1.0 if recipe.predicts_inputs else recipe.corrections[self.order.sweep - 1]
        elif recipe.sequential:
            given, correction = self._captured(unit, captured), 1.0
        else:
            return entry.inputs[unit.source], Target(outputs)
        shift = correction - 1 if unit.residual else correction * unit.share
        return given, Target(outputs, entry.inputs[unit.source], given, shift)

    # -- fits ------------------------------------------------------------------------------------------------------

    def _fit(self, unit: FitUnit, captured: dict[str, Spool]) -> None:
        recipe = self.recipe
        inputs, target = self._activations(unit, captured)
        sizes = [
            (self.calibrations[block].rms[name], self._stored(block, name).numel()) for block, name in _parameters(unit)
        ]
        parameters, done = fit(
            UnitModules(unit, self.modules),
            self.keep,
            [step.call for step in unit.steps],
            inputs,
            target,
            FitSettings(
                tolerance=recipe.tolerance,
                epochs=recipe.epochs,
                batch=recipe.batch,
                learning_rate=recipe.learning_rate * (SWEEP_RATE if self.order.sweep else 1),
                seed=derived_seed(recipe.seed, unit.first, unit.name, self.order.sweep),
                dtype=fitted_in(self.skeleton.dtype),
            ),
            rate_unit(sizes, self.skeleton.hidden_size),
        )
        for block in blocks_of(unit):
            prefix = f"{block}."
            self._put(block, {n.removeprefix(prefix): t for n, t in parameters.items() if n.startswith(prefix)})
        self.units[unit.first].append(
            UnitReport(
                name=unit.name,
                error_before=done.error_before,
                error_after=done.error_after,
                improved=done.improved,
                share=done.share,
                steps=done.steps,
                learning_rate=done.learning_rate,
                flops=done.flops,
            )
        )

    # -- the result ------------------------------------------------------------------------------------------------

    def reports(self) -> list[WorkReport]:
        """Counted zeros, errors, seconds of each block."""
        return [self._report(index) for index in self.order.blocks]

    def _report(self, index: int) -> WorkReport:
        layers: dict[str, LayerCount] = {}
        for weight in self.calibrations[index].anatomy.weights:
            matrix = weight.of(self._stored(index, weight.parameter))
            layers[weight.name] = {"zeros": count_zeros(matrix), "weights": matrix.numel()}
        seconds = self.seconds[index]
        flops = sum(unit["flops"] for unit in self.units[index])
        return {
            "block": index,
            "sweep": self.order.sweep,
            "sparsity": sum(each["zeros"] for each in layers.values())
            / sum(each["weights"] for each in layers.values()),
            "gflops": flops / seconds["reconstruct"] / 1e9 if flops else None,
            "seconds": dict(seconds),
            "units": self.units[index],
            "layers": layers,
            "fallbacks": dict(self.choosers[index].fallbacks),
            "spool_disk": self.calibrations[index].disk_bytes,
        }


def _close(spools: Mapping[str, Spool]) -> None:
    for spool in spools.values():
        spool.close()


def _parameters(unit: FitUnit) -> list[tuple[int, str]]:
    """The stored tensors that hold the unit's weights, with their blocks."""
    return list(dict.fromkeys((block, weight.parameter) for block, weight in unit.weights))
