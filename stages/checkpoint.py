"""A Hugging Face checkpoint on disk: headers first, tensors when asked, safetensors only.

Nothing here keeps a tensor, a file handle or a memory map alive after it returns, so a process's memory is what it
chose to load.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stages.errors import Refusal

INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
READ_CHUNK = 16 << 20  # bytes hashed at a time


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies and how big it is, from its file's header."""

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 8

    @property
    def bytes(self) -> int:
        return self.elements * self.itemsize


class Checkpoint:
    """The tensors of one checkpoint directory, known by their headers.

    Raises Refusal for a directory without safetensors, a pickle-only one, a missing shard file, a truncated one.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.entries = _read_headers(directory)

    @classmethod
    def of_file(cls, path: Path) -> "Checkpoint":
        """One safetensors file as a checkpoint."""
        checkpoint = cls.__new__(cls)
        checkpoint.directory = path.parent
        checkpoint.entries = {entry.name: entry for entry in _entries(path)}
        return checkpoint

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def entry(self, name: str) -> TensorEntry:
        """The tensor's entry. Raises Refusal if the checkpoint lacks it."""
        if name not in self.entries:
            raise Refusal(f"{self.directory}: no tensor {name}; the checkpoint does not match its config.json")
        return self.entries[name]

    def load(self, names: Iterable[str], dtype: torch.dtype | None = None, device: str = "cpu") -> dict[str, Tensor]:
        """The named tensors, each in memory of its own, converted to `dtype` if they are floating point.

        Raises Refusal naming the tensor that holds a NaN or an infinity, or that the checkpoint lacks.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.entry(name).file, []).append(name)
        loaded: dict[str, Tensor] = {}
        for file, members in by_file.items():
            with _opened(self.directory / file) as handle:
                for name in members:
                    tensor = handle.get_tensor(name)
                    target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
                    loaded[name] = _finite(tensor.to(device=device, dtype=target, copy=True), f"{file}: {name}")
        return loaded


def _finite(tensor: Tensor, name: str) -> Tensor:
    # One pass: a sum is finite exactly when no term is NaN or infinite (float32 cannot overflow on weights).
    if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float32)):
        bad = (~torch.isfinite(tensor)).sum().item()
        if bad:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise Refusal(
                f"{name}: {bad} of {tensor.numel()} weights are NaN or infinite as {dtype}; repair the checkpoint, "
                "or choose a --dtype with a wider range"
            )
    return tensor


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(str(path), framework="pt")
    except SafetensorError as error:
        size = path.stat().st_size
        raise Refusal(
            f"{path}: truncated or not a safetensors file ({size} bytes: {error}); fetch that file again"
        ) from None


def _read_headers(directory: Path) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for file, listed in _files(directory).items():
        path = directory / file
        if not path.is_file():
            raise Refusal(f"{path}: listed in {INDEX} but missing; fetch that file again")
        entries.update((entry.name, entry) for entry in _entries(path))
        missing = [name for name in listed if name not in entries]
        if missing:
            raise Refusal(f"{path}: {INDEX} promises {missing[0]} in it, but it is not there; fetch the files again")
    return entries


def _entries(path: Path) -> list[TensorEntry]:
    with _opened(path) as handle:
        views = [(name, handle.get_slice(name)) for name in handle.keys()]  # noqa: SIM118 (safe_open is no mapping)
        return [TensorEntry(name, path.name, tuple(view.get_shape()), view.get_dtype()) for name, view in views]


def _files(directory: Path) -> dict[str, list[str]]:
    """File name -> the tensors that the index promises in it (none promised without an index)."""
    index = directory / INDEX
    if index.is_file():
        files: dict[str, list[str]] = {}
        try:
            for name, file in json.loads(index.read_text())["weight_map"].items():
                if not file or Path(file).name != file:
                    raise ValueError(f"{file!r} is not the name of a file beside it")
                files.setdefault(file, []).append(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Refusal(f"{index}: not a safetensors index ({error!r}); fetch that file again") from None
        return files
    found = sorted(path.name for path in directory.glob("*.safetensors"))
    if len(found) > 1 and "model.safetensors" not in found:
        raise Refusal(f"{directory}: {len(found)} safetensors files but no {INDEX}; fetch the index too")
    if found:
        return {"model.safetensors" if "model.safetensors" in found else found[0]: []}
    pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if pickles:
        raise Refusal(
            f"{directory}: only pickled weights ({pickles[0]}), and a pickle can run code when it is read; "
            "convert it to safetensors first (transformers: save_pretrained)"
        )
    raise Refusal(f"{directory}: no *.safetensors in it; give the directory of a Hugging Face checkpoint")


def resolve(model: str) -> Path:
    """The local directory of a model: itself, or a hub id's snapshot (safetensors and text files only).

    Raises Refusal if there is no such directory and the hub has no such model or cannot be reached.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise Refusal(f"{path}: no config.json in it; give the directory of a Hugging Face checkpoint")
        return path.resolve()
    if path.exists():
        raise Refusal(f"{path}: a file, not a checkpoint directory; give the directory that holds config.json")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise Refusal(f"{model}: no such model directory, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.bin"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=["*.bin", "original/*"]))
    except LocalEntryNotFoundError:
        raise Refusal(f"{model}: no such directory, and the hub cannot be reached; give a local checkpoint") from None
    except (HfHubHTTPError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise Refusal(f"{model}: no such directory, and the hub refuses that id ({first_line})") from None


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        save_file(plain, str(temporary), metadata={"format": "pt"})
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        digest = file_digest(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise _write_refusal(path, error) from error
    sync_directory(path.parent)
    return digest


def _write_refusal(path: Path, error: Exception) -> Exception:
    text = str(error)
    if "No space left" in text or "os error 28" in text or getattr(error, "errno", None) == 28:
        free = os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize
        return Refusal(f"{path}: disk full ({free >> 20} MiB free); free some space, then `espalier resume`")
    return error


def sync_directory(directory: Path) -> None:
    """Make a rename in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """`sha256:...` of a file, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(READ_CHUNK):
            digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"
