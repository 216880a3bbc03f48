"""A Hugging Face checkpoint on disk: headers first, tensors when asked, safetensors only.

Nothing here keeps a tensor, a file handle or a memory map alive after it returns, so a process's memory is what it
chose to load.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from espalier.stages.devices import on_accelerator
from espalier.stages.errors import Refusal, first_line
from espalier.stages.storage.files import file_digest, is_full, replacing, sync
from espalier.stages.storage.headers import TensorEntry, entries_of, opened, read_headers, unread_files
from espalier.stages.storage.staging import placing, to_host

WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]  # of a hub id's files
UNWANTED = ["original/*", "consolidated*", "*.bin.index.json"]  # the same weights once more, in other formats


class Checkpoint:
    """The tensors of one checkpoint directory, known by their headers.

    Raises Refusal for a directory without safetensors, a pickle-only one, a missing shard file, a truncated one.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.entries = read_headers(directory)

    @classmethod
    def of_file(cls, path: Path) -> "Checkpoint":
        """One safetensors file as a checkpoint."""
        checkpoint = cls.__new__(cls)
        checkpoint.directory = path.parent
        checkpoint.entries = {entry.name: entry for entry in entries_of(path.parent, path.name)}
        return checkpoint

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def entry(self, name: str) -> TensorEntry:
        """The tensor's entry. Raises Refusal if the checkpoint lacks it."""
        if name not in self.entries:
            like = next((other for other in self.entries if other.casefold() == name.casefold()), None)
            beside = f" (there is {like}, and capitals count)" if like else ""
            raise Refusal(
                f"{self.directory}: no tensor {name}{beside}; the checkpoint does not match its config.json; "
                "fetch both again"
            )
        return self.entries[name]

    def unread_files(self) -> list[str]:
        """Weights in the directory that are not the checkpoint's, and an index that does not count."""
        return unread_files(self.directory, sorted({entry.file for entry in self.entries.values()}))

    def load(self, names: Iterable[str], dtype: torch.dtype | None = None, device: str = "cpu") -> dict[str, Tensor]:
        """The named tensors, each in memory of its own, converted to `dtype` if they are floating point.

        Raises Refusal naming the tensor that holds a NaN or an infinity, or that the checkpoint lacks.
        """
        loaded: dict[str, Tensor] = {}
        files: dict[str, str] = {}
        place = placing(device)
        for file, name, tensor in self._tensors(names):
            target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            loaded[name], files[name] = place(tensor, target), file
            if not on_accelerator(device):
                _check_finite(loaded[name], f"{file}: {name}")
        if on_accelerator(device) and not _all_finite(loaded.values()):
            for name, tensor in loaded.items():
                _check_finite(tensor, f"{files[name]}: {name}")
        return loaded

    def copies(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors bit for bit, whatever their dtype and whatever is in them."""
        return {name: tensor.clone() for _, name, tensor in self._tensors(names)}

    def _tensors(self, names: Iterable[str]) -> Iterator[tuple[str, str, Tensor]]:
        """(file, name, tensor) of each, mapped from its file, each file opened once."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.entry(name).file, []).append(name)
        for file, members in by_file.items():
            with opened(self.directory / file) as handle:
                for name in members:
                    yield file, name, handle.get_tensor(name)


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds a NaN or an infinity, asked of their device once.

    A sum is finite exactly when no term is NaN or infinite (float32 cannot overflow on weights).
    """
    sums = [tensor.sum(dtype=torch.float32) for tensor in tensors if tensor.is_floating_point()]
    return not sums or bool(torch.isfinite(torch.stack(sums)).all())


def _check_finite(tensor: Tensor, name: str) -> None:
    if not _all_finite([tensor]):
        bad = (~torch.isfinite(tensor)).sum().item()
        if bad:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise Refusal(
                f"{name}: {bad} of {tensor.numel()} weights are NaN or infinite as {dtype}; repair the checkpoint, "
                "or choose a --dtype with a wider range"
            )


def resolve(model: str) -> Path:
    """The local directory of a model: itself, or a hub id's snapshot (safetensors and text files only).

    Raises Refusal if there is no such directory and the hub has no such model or cannot be reached, and for an adapter.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        _refuse_adapter(path)
        if not (path / "config.json").is_file():
            raise Refusal(f"{path}: no config.json in it; give the directory of a Hugging Face checkpoint")
        return path.resolve()
    if path.exists():
        raise Refusal(f"{path}: a file, not a checkpoint directory; give the directory that holds config.json")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise Refusal(f"{model}: no such model directory, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(model, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except LocalEntryNotFoundError:
        raise Refusal(f"{model}: no such directory, and the hub cannot be reached; give a local checkpoint") from None
    except (HfHubHTTPError, OSError) as error:
        raise Refusal(f"{model}: no such directory, and the hub refuses that id ({first_line(error)})") from None
    _refuse_adapter(found)
    return found


def _refuse_adapter(directory: Path) -> None:
    path = directory / "adapter_config.json"
    if not path.is_file():
        return
    try:
        base = json.loads(path.read_bytes()).get("base_model_name_or_path") or "its base model"
    except (OSError, ValueError, AttributeError):
        base = "its base model"
    raise Refusal(
        f"{directory}: an adapter (LoRA) of {base}, not a whole model; merge it first: peft's "
        "AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...), and give what that "
        f"writes; if it is merged already, remove {path.name}"
    )


def grouped(entries: Iterable[TensorEntry], limit: int) -> list[list[TensorEntry]]:
    """The entries in order, cut into groups of at most `limit` bytes (a larger tensor is a group of its own)."""
    groups: list[list[TensorEntry]] = []
    filled = limit
    for entry in entries:
        if filled + entry.bytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += entry.bytes
    return groups


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write one safetensors file and return its digest: temporary name, fsync, read back, then the final name.

    The digest is of the bytes that came back from the file system. Raises Refusal when the disk is full.
    """
    try:
        plain = dict(zip(tensors, to_host(list(tensors.values())), strict=True))
        with replacing(path) as temporary:
            save_file(plain, str(temporary), metadata={"format": "pt"})
            sync(temporary)
            return file_digest(temporary)
    except (OSError, SafetensorError) as error:
        if not is_full(error):
            raise
        disk = os.statvfs(path.parent)
        free = disk.f_bavail * disk.f_frsize >> 20
        raise Refusal(f"{path}: disk full ({free} MiB free); free some space, then `espalier resume`") from error
