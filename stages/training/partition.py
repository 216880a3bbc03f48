"""The ZeRO partition of one rank: of each parameter the slice that it updates, as views into DeepSpeed's own state.

DeepSpeed lays a rank's share out differently in each stage: stages 1 and 2 cut one flat buffer of all parameters,
stage 3 cuts every parameter by itself and pads, stage 0 cuts nothing. Here all of them are lists of (name, start,
view). What reads or writes a rank's share (checkpoints, the shadow tracker) sees no stages.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, by the names that torch's and DeepSpeed's optimizers give them


@dataclass(frozen=True, slots=True)
class PartitionSlice:
    """Elements `start` to `start + len(master)` of one flattened parameter.

    `master` is the float32 copy that the optimizer updates, a view. `home` is the optimizer's own tensor that it lies
    in, from element `offset` on; Adam's moments lie likewise in the tensors of the optimizer's state for `home`.
    """

    name: str
    start: int
    master: Tensor
    home: Tensor
    offset: int

    def moment(self, state: dict[str, Any], key: str) -> Tensor:
        """This slice of one of Adam's moments, a view; `state` is the optimizer's state for `home`."""
        return state[key].view(-1).narrow(0, self.offset, self.master.numel())

    def part(self, first: int, last: int) -> "PartitionSlice":
        """Its elements `first` to `last` - 1 alone, counted in the parameter."""
        inside = first - self.start
        view = self.master.narrow(0, inside, last - first)
        return PartitionSlice(self.name, first, view, self.home, self.offset + inside)


def held(engine: Any) -> list[PartitionSlice]:
    """Everything whose float32 master this rank keeps: its own share in stages 1 to 3, all parameters in stage 0."""
    stage = engine.zero_optimization_stage()
    trained = [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]
    if stage == 3:
        return list(_stage_three(engine, trained))
    if stage == 0:
        return list(_stage_zero(engine, trained))
    return list(_stages_one_and_two(engine, trained))


def owned(engine: Any) -> list[PartitionSlice]:
    """What this rank answers for: over all ranks, every element of every parameter once.

    In stage 0, where every rank keeps everything, each answers for an equal share of every parameter.
    """
    slices = held(engine)
    if engine.zero_optimization_stage() != 0:
        return slices
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    shares = ((slice_, *share_of(slice_.master.numel(), rank, ranks)) for slice_ in slices)
    return [slice_.part(first, last) for slice_, first, last in shares if last > first]


def slices(engine: Any) -> list[tuple[str, int, Tensor]]:
    """`owned` as (parameter name, start, flat float32 view)."""
    return [(slice_.name, slice_.start, slice_.master) for slice_ in owned(engine)]


def share_of(elements: int, rank: int, ranks: int) -> tuple[int, int]:
    """[first, last) of an equal share; the last ranks' may be short, or empty."""
    share = -(-elements // ranks)
    return min(rank * share, elements), min((rank + 1) * share, elements)


def _stage_zero(engine: Any, trained: list[tuple[str, nn.Parameter]]) -> Iterator[PartitionSlice]:
    """In float32 the parameters are their own masters; in 16 bits DeepSpeed keeps a float32 copy of each."""
    masters = {id(parameter): parameter for _, parameter in trained}
    if hasattr(engine.optimizer, "fp32_groups"):
        for parameters, copies in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
            masters |= {id(parameter): copy for parameter, copy in zip(parameters, copies, strict=True)}
    for name, parameter in trained:
        master = masters[id(parameter)]
        yield PartitionSlice(name, 0, master.detach().view(-1), master, 0)


def _stages_one_and_two(engine: Any, trained: list[tuple[str, nn.Parameter]]) -> Iterator[PartitionSlice]:
    optimizer = engine.optimizer
    # In bf16 stage 1 is another class of DeepSpeed's, with other names for the same things.
    flats = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
    for name, parameter in trained:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:  # else none of it is in this rank's share
            flat = flats[mapping.param_group_index]
            address = mapping.hp_fragment_address
            view = flat.detach().narrow(0, address.start, address.numel)
            yield PartitionSlice(name, mapping.lp_fragment_address.start, view, flat, address.start)


def _stage_three(engine: Any, trained: list[tuple[str, nn.Parameter]]) -> Iterator[PartitionSlice]:
    optimizer = engine.optimizer
    rank = torch.distributed.get_rank()
    for name, parameter in trained:
        group, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = rank * share
        length = min(share, parameter.ds_numel - start)  # type: ignore[attr-defined]
        if length > 0:  # beyond that, padding
            flat = optimizer.fp32_partitioned_groups_flat[group]
            yield PartitionSlice(name, start, flat.detach().narrow(0, offset, length), flat, offset)


def state_bytes(engine: Any) -> dict[str, int]:
    """Bytes that this rank keeps between steps: of parameters (with float32 masters), and of the optimizer's state.

    Counted over the storages of the tensors themselves; one that several share counts once.
    """
    parameters: list[Tensor] = []
    for parameter in engine.module.parameters():
        parameters += [parameter.data, *([parameter.ds_tensor.data] if hasattr(parameter, "ds_tensor") else [])]
    parameters += [slice_.home.data for slice_ in held(engine)]
    states = [
        value
        for state in engine.basic_optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    return {"parameters": _stored(parameters), "optimizer": _stored(states)}


def _stored(tensors: list[Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
