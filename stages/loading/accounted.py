"""Every tensor of a checkpoint accounted for, from headers alone: what the model reads must be there, of its shape and
plain; what it does not read is named, for it is copied to the output as it is."""

from collections.abc import Iterator

import torch

from espalier.stages.errors import Refusal
from espalier.stages.loading.skeleton import Skeleton, tied_names
from espalier.stages.storage.headers import DTYPES
from espalier.stages.storage.hf_checkpoint import Checkpoint
from espalier.stages.storage.quantised import not_plain

NAMED = 3  # of what is listed, so many by name


def check_tensors(skeleton: Skeleton, checkpoint: Checkpoint) -> None:
    """Raises Refusal for a parameter that the checkpoint lacks, holds quantised, or in another shape than the config
    says."""
    storage, tied = skeleton.storage, tied_names(skeleton.model)
    tied |= {partner: name for name, partner in tied.items()}
    for name, is_float in _parameters(skeleton):
        if name not in storage:
            if tied.get(name, name) not in storage:
                raise _missing(name, skeleton, checkpoint)
            continue
        parts = storage.of(name).split(torch.empty(storage.shapes[name], device="meta"))
        for stored, part in parts.items():
            entry = checkpoint.entry(stored)
            if is_float and entry.dtype not in DTYPES:
                raise not_plain(checkpoint.directory, entry)
            if entry.shape != tuple(part.shape):
                raise Refusal(
                    f"{entry.file}: {stored} is {entry.shape}, config.json says {tuple(part.shape)}; fetch both again"
                )


def remarks(skeleton: Skeleton, checkpoint: Checkpoint) -> list[str]:
    """A line for the tensors that the model does not read, and one for the files that are not read; none if none."""
    found = []
    if unread := list(skeleton.storage.unread):
        found.append(
            f"{len(unread)} tensor{'s' * (len(unread) > 1)} that {type(skeleton.model).__name__} does not read (copied "
            f"unchanged where something is written): {_some(unread)}"
        )
    if files := checkpoint.unread_files():
        found.append(f"not read, as transformers does not read it beside the model's own files: {_some(files)}")
    return found


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _parameters(skeleton: Skeleton) -> Iterator[tuple[str, bool]]:
    """The names of all that is loaded, and whether it holds floating-point numbers."""
    outer = dict(skeleton.model.named_parameters())
    yield from ((name, outer[name].is_floating_point()) for name in skeleton.outer)
    for index, layer in enumerate(skeleton.layers):
        names, tensors = skeleton.parameters_of(index), layer.state_dict()
        yield from ((names[inside], tensor.is_floating_point()) for inside, tensor in tensors.items())


def _missing(name: str, skeleton: Skeleton, checkpoint: Checkpoint) -> Refusal:
    """What to say of a parameter that is not there, by what lies where it should."""
    directory = checkpoint.directory
    beside = _beside(name, skeleton.storage.unread)
    if adapter := next((stored for stored in beside if "lora_" in stored or "base_layer" in stored), None):
        return Refusal(
            f"{directory}: {adapter} in place of {name}: an adapter that is not merged; merge it first (peft: "
            "merge_and_unload, save_pretrained)"
        )
    if packed := next((stored for stored in beside if checkpoint.entry(stored).dtype not in DTYPES), None):
        return not_plain(directory, checkpoint.entry(packed))
    head = skeleton.model.get_output_embeddings()
    if head is not None and name.rpartition(".")[0] in {n for n, m in skeleton.model.named_modules() if m is head}:
        return Refusal(
            f'{directory}: no tensor {name}, and config.json says "tie_word_embeddings": false: transformers would '
            "initialise it at random; fetch the checkpoint again, or write true there if the head is the embedding"
        )
    checkpoint.entry(skeleton.storage.of(name).names[0])  # refuses, and points out a name in other capitals
    raise AssertionError(f"{name} is there under its own name")


def _beside(name: str, unread: dict[str, str]) -> list[str]:
    """What lies in the module of that parameter, by its name on disk, and is not read."""
    module = name.rpartition(".")[0] + "."
    return [stored for stored, model in unread.items() if module in f"{model}." or module in f"{stored}."]
