"""A training run's state on disk: every rank's slices of the parameters and of Adam's moments, each by (name, start).

HOME/checkpoint-00000100/state.json                        step, losses so far; written last
HOME/checkpoint-00000100/master-0-of-2.safetensors         rank 0's slices, each a flat float32 tensor `name@start`
HOME/checkpoint-00000100/exp_avg-0-of-2.safetensors        and those of each moment
HOME/checkpoint-00000100/shadow-0-of-2.safetensors         its tracker, if there is one

DeepSpeed's own checkpoints are pickles, and are cut as the ranks were. A slice that says what it is a slice of can be
read back in any other cut: on another number of ranks, in another stage, or whole.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from espalier.stages.errors import Refusal
from espalier.stages.storage.files import move_into_place, write_text
from espalier.stages.storage.hf_checkpoint import Checkpoint, write_tensors
from espalier.stages.training.partition import MOMENTS, PartitionSlice

STATE = "state.json"
MASTER = "master"
KINDS = (MASTER, *MOMENTS)


def write_slices(directory: Path, kind: str, slices: Iterable[tuple[str, int, Tensor]], rank: int, ranks: int) -> None:
    """This rank's slices of one kind in a file of their own: (parameter, start, flat tensor)."""
    # Clones, as safetensors refuses tensors that share memory, and these are views of one.
    tensors = {f"{name}@{start}": tensor.detach().to("cpu", copy=True) for name, start, tensor in slices}
    write_tensors(directory / f"{kind}-{rank}-of-{ranks}.safetensors", tensors)


class StoredSlices:
    """All ranks' slices of one kind, to be read in any cut."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.directory = directory
        self._found: dict[str, list[tuple[int, int, Path]]] = {}  # name -> (start, stop, file) in order
        for path in sorted(directory.glob(f"{kind}-*-of-*.safetensors")):
            for key, entry in Checkpoint.of_file(path).entries.items():
                name, _, start = key.rpartition("@")
                self._found.setdefault(name, []).append((int(start), int(start) + entry.elements, path))
        for places in self._found.values():
            places.sort()

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Elements `start` to `start + count` - 1 of a flattened parameter. Raises Refusal if some are not there."""
        parts: list[Tensor] = []
        wanted = start
        for first, last, path in self._found.get(name, []):
            if first <= wanted < min(last, start + count):
                with safe_open(str(path), framework="pt") as file:
                    part = file.get_slice(f"{name}@{first}")[wanted - first : min(last, start + count) - first]
                parts.append(part)
                wanted += len(part)
        if wanted != start + count:
            raise Refusal(f"{self.directory}: {name} is not whole in it (element {wanted} is missing); start anew")
        return torch.cat(parts)

    def fill(self, model: torch.nn.Module) -> None:
        """Give the model's parameters their values; those that were not trained keep theirs."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in self:
                    parameter.copy_(self.read(name, 0, parameter.numel()).view(parameter.shape))


def latest(home: Path) -> Path | None:
    """The newest whole checkpoint of a run; None if there is none."""
    whole = [path for path in home.glob("checkpoint-*") if (path / STATE).is_file()]
    return max(whole, key=lambda path: path.name, default=None)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `finish` wrote."""
    return json.loads((checkpoint / STATE).read_text())


def directory_of(home: Path, step: int) -> Path:
    """Where the state after `step` optimizer steps is gathered before it is whole."""
    return home / f"gathering-{step:08d}"


def finish(home: Path, step: int, state: dict[str, Any]) -> Path:
    """Every rank's files are in `directory_of`: make it a checkpoint, and remove older ones. For one rank to do."""
    gathering, final = directory_of(home, step), home / f"checkpoint-{step:08d}"
    write_text(gathering / STATE, json.dumps(state))
    move_into_place(gathering, final)
    for found in [*home.glob("checkpoint-*"), *home.glob("gathering-*")]:
        if int(found.name.rpartition("-")[2]) < step:
            shutil.rmtree(found, ignore_errors=True)
    return final


def write_state(directory: Path, owned: list[PartitionSlice], optimizer: Any, rank: int, ranks: int) -> None:
    """This rank's share of masters and moments, a file each."""
    write_slices(directory, MASTER, ((slice_.name, slice_.start, slice_.master) for slice_ in owned), rank, ranks)
    for key in MOMENTS:
        found = ((slice_.name, slice_.start, slice_.moment(optimizer.state[slice_.home], key)) for slice_ in owned)
        write_slices(directory, key, found, rank, ranks)


def read_back(checkpoint: Path, held: list[PartitionSlice], optimizer: Any, new_state: Any) -> None:
    """Masters and moments of everything this rank holds, from whatever ranks wrote them.

    `new_state(home)` makes the optimizer's state for one of its tensors, as after the checkpoint's steps.
    """
    stored = {kind: StoredSlices(checkpoint, kind) for kind in KINDS}
    for slice_ in held:
        if slice_.home not in optimizer.state or MOMENTS[0] not in optimizer.state[slice_.home]:
            optimizer.state[slice_.home] = new_state(slice_.home)
        state = optimizer.state[slice_.home]
        targets = {MASTER: slice_.master, **{key: slice_.moment(state, key) for key in MOMENTS}}
        for kind, target in targets.items():
            target.copy_(stored[kind].read(slice_.name, slice_.start, slice_.master.numel()))
