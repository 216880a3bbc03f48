"""Where a checkpoint's tensors lie: the files that transformers would read, and what their headers say."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from espalier.stages.errors import Refusal

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # of weights
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
# Weights beside a model that are not the model's: adapters, and Mistral's own format of the same weights.
OTHERS = ("adapter*.safetensors", "consolidated*.safetensors")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies and how big it is, from its file's header. `file` is relative to the checkpoint."""

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
    def bytes(self) -> int:
        return self.elements * BITS.get(self.dtype, 64) // 8


def opened(path: Path) -> safe_open:
    """The file, to read tensors from. Raises Refusal if it cannot be read or is not whole."""
    try:
        return safe_open(str(path), framework="pt")
    except SafetensorError as error:
        size = path.stat().st_size
        raise Refusal(
            f"{path}: truncated or not a safetensors file ({size} bytes: {error}); fetch that file again"
        ) from None
    except OSError as error:
        raise Refusal(f"{path}: cannot be read ({error.strerror or error}); see to it, or fetch it again") from None


def entries_of(directory: Path, file: str) -> list[TensorEntry]:
    """The tensors of one file. Raises Refusal as `opened` does."""
    with opened(directory / file) as handle:
        views = [(name, handle.get_slice(name)) for name in handle.keys()]  # noqa: SIM118 (safe_open is no mapping)
        return [TensorEntry(name, file, tuple(view.get_shape()), view.get_dtype()) for name, view in views]


def read_headers(directory: Path) -> dict[str, TensorEntry]:
    """Every tensor of a checkpoint, by name.

    Raises Refusal for a file that is missing, not whole, or lacks what the index promises in it, and for two tensors
    of one name that are not the same.
    """
    entries: dict[str, TensorEntry] = {}
    for file, listed in _files(directory).items():
        path = directory / file
        if not path.is_file():
            raise Refusal(f"{path}: {_why_not(path, bool(listed))}; fetch that file again")
        for entry in entries_of(directory, file):
            if (other := entries.setdefault(entry.name, entry)) is not entry and not _same(directory, other, entry):
                raise Refusal(
                    f"{directory}: {entry.name} lies in {other.file} and, with other values, in {file}; "
                    "fetch both files again"
                )
        missing = [name for name in listed if name not in entries]
        if missing:
            raise Refusal(f"{path}: {INDEX} promises {missing[0]} in it, but it is not there; fetch the files again")
    return entries


def _why_not(path: Path, listed: bool) -> str:
    if path.is_dir():
        return "a folder, not a file"
    if path.is_symlink():
        return "a link to what is not there"
    return f"listed in {INDEX} but missing" if listed else "named in config.json (transformers_weights) but missing"


def _same(directory: Path, one: TensorEntry, other: TensorEntry) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    with opened(directory / one.file) as first, opened(directory / other.file) as second:
        pair = (first.get_tensor(one.name), second.get_tensor(one.name))
        return torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in pair))


def unread_files(directory: Path, read: Sequence[str]) -> list[str]:
    """The weights beside those that are `read`, and an index that is not followed."""
    found = {path.name for path in directory.glob("*.safetensors")} - set(read)
    if found and read == [WEIGHTS] and (directory / INDEX).is_file():
        found.add(INDEX)
    return sorted(found)


def _files(directory: Path) -> dict[str, list[str]]:
    """File -> the tensors that the index promises in it (none promised without one), as transformers chooses: a file
    that config.json names, else model.safetensors, else those of the index."""
    chosen = _named_in_config(directory)
    one = directory / WEIGHTS
    if chosen is None and (one.is_file() or (one.is_symlink() and not (directory / INDEX).is_file())):
        return {WEIGHTS: []}  # whatever an index says: save_pretrained leaves one that was there
    if chosen is not None and not chosen.endswith(".index.json"):
        return {_inside(directory, chosen): []}
    index = directory / (_inside(directory, chosen) if chosen else INDEX)
    if index.is_file():
        return _indexed(directory, index)
    if chosen:
        raise Refusal(f"{index}: {_why_not(index, listed=False)}; fetch that file again")
    others = {path.name for pattern in OTHERS for path in directory.glob(pattern)}
    found = sorted(path.name for path in directory.glob("*.safetensors") if path.name not in others)
    if len(found) > 1:
        raise Refusal(f"{directory}: {len(found)} safetensors files but no {INDEX}; fetch the index too")
    if found:
        return {found[0]: []}
    pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if pickles:
        raise Refusal(
            f"{directory}: only pickled weights ({pickles[0]}), and a pickle can run code when it is read; "
            "convert it to safetensors first (transformers: save_pretrained)"
        )
    beside = f" but {', '.join(sorted(others))}, which transformers does not read as a model" if others else ""
    raise Refusal(
        f"{directory}: no {'model' if others else '*'}.safetensors in it{beside}; give the directory of a Hugging Face "
        "checkpoint"
    )


def _named_in_config(directory: Path) -> str | None:
    """The file that config.json tells transformers to load, if it names one."""
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None  # a shadow, or a config whose reader says what is wrong with it
    named = config.get("transformers_weights") if isinstance(config, dict) else None
    return named if isinstance(named, str) else None


def _indexed(directory: Path, index: Path) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    try:
        weight_map: dict[str, Any] = json.loads(index.read_bytes())["weight_map"]
        for name, file in weight_map.items():
            if file not in files:
                _inside(directory, file)
            files.setdefault(file, []).append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, Refusal):
            raise Refusal(
                f"{index}: not a safetensors index ({str(error).partition(';')[0]}); fetch it again"
            ) from None
        raise Refusal(f"{index}: not a safetensors index ({error!r}); fetch that file again") from None
    if not files:
        raise Refusal(f"{index}: not a safetensors index (it names no tensor); fetch that file again")
    return files


def _inside(directory: Path, file: Any) -> str:
    """`file` itself. Raises Refusal unless it is one inside `directory`.

    It may be a link (the hub's cache links to its blobs), the folders on the way to it may not lead elsewhere.
    """
    path = PurePosixPath(file)
    if not path.name or path.is_absolute() or ".." in path.parts or "\0" in file:
        raise Refusal(f"{file!r} is not the name of a file in {directory}; fetch what names it again")
    if not (directory / path).parent.resolve().is_relative_to(directory.resolve()):
        raise Refusal(f"{file!r} leads out of {directory}; put the files themselves there")
    return str(file)
