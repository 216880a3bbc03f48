"""Where calibration and evaluation text comes from: files, folders, hub data sets and Python lists, as documents.

Local files are read by `espalier.stages.text.text_file` and `espalier.stages.text.records`, which need no cache, so a
home that cannot be written to does not matter; a hub data set is read through `datasets` streaming.
"""

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from espalier.stages.errors import Refusal
from espalier.stages.text.documents import Document, Reading
from espalier.stages.text.records import (
    ARROW_SUFFIXES,
    JSON_SUFFIXES,
    ROWS_PER_READ,
    TABLE_SUFFIXES,
    Reader,
    Record,
    arrow_batches,
    first_line,
    readable,
    reader_of,
    refusing,
    rows,
)
from espalier.stages.text.text_file import PACKED_SUFFIXES, inner_name, looks_like_text, text_blocks

HUB_TIMEOUT_SECONDS = 4.0
HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?")
# What of a folder is read: the first of these that any of its files is; what is no more than a note beside data last.
LAYERS = ((".txt", ".jsonl", ".ndjson", *ARROW_SUFFIXES), (".json",), TABLE_SUFFIXES)
BESIDE = ("readme", "license", "licence", "notice", "requirements")
GIVE = "give a text, JSONL, CSV or Parquet file, a folder of those or one that datasets saved, or a hub data set"


def documents(source: str | Path | Sequence[str], purpose: str, reading: Reading) -> Iterator[Document]:
    """The documents of `source` in order; see `build_token_table` for the kinds. `reading` keeps account.

    Raises Refusal, in words that name `purpose` ("calibration", "evaluation") and the file, for what cannot be read.
    """
    if not isinstance(source, str | Path):
        reading.no_columns(f"{purpose} text {describe(source)}")
        for index, text in enumerate(source):
            if not isinstance(text, str):
                raise Refusal(f"{purpose} text {index} of the list is of type {type(text).__name__}, not a string")
            yield reading.of(text, f"{purpose} text {index} of the list")
        return
    path = Path(source).expanduser()
    if path.exists() and str(source):  # Path("") would be the current folder
        yield from _local(path, purpose, reading)
        return
    match = HUB_ID.fullmatch(str(source))
    known = (".txt", ".md", *JSON_SUFFIXES, *ARROW_SUFFIXES, *TABLE_SUFFIXES, *PACKED_SUFFIXES)
    if match is None or path.suffix in known or path.parent.is_dir():
        raise Refusal(f'{purpose} text "{source}": no such file or folder; {GIVE} as owner/name[:config][:split]')
    name = f"{purpose} data set {source}"
    yield from reading.records(_hub_reader(match["name"], match["config"], match["split"], name), name)


def holds_ids(source: str, text_column: str | None) -> bool:
    """Whether a file or folder holds token ids, which need no tokenizer."""
    try:
        first = next(documents(source, "calibration", Reading(None, text_column)), None)
    except Refusal:
        return False
    return first is not None and first.ids is not None


def describe(source: str | Path | Sequence[object]) -> str:
    """The source in a few words for messages: a file's name, a hub id, or what the list holds."""
    if isinstance(source, str | Path):
        path = Path(source)
        return path.name if path.expanduser().exists() else str(source)
    if not len(source):
        return "(an empty list)"
    return f"(a list of {len(source)} {'texts' if isinstance(source[0], str) else 'id lists'})"


# --- files and folders ------------------------------------------------------------------------------------------------


def _local(path: Path, purpose: str, reading: Reading) -> Iterator[Document]:
    if path.is_dir() and (saved := _saved(path, f"{purpose} text {path.name}", reading)):
        yield from reading.records(saved, f"{purpose} text {path.name}")
        return
    for file in _files(path, purpose, reading) if path.is_dir() else [path]:
        name = f"{purpose} text {file.name}"
        reader = reader_of(file, name)
        if reader is None:
            yield reading.file(text_blocks(file, name), name)
        elif file.stat().st_size:
            yield from reading.records(reader, name)


def _files(folder: Path, purpose: str, reading: Reading) -> list[Path]:
    """The folder's files that are read, in order: all of the first of LAYERS that it has, else all that are text."""
    visible = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if not visible:
        raise Refusal(f"{purpose} text {folder}: the folder holds no files")
    data = [file for file in visible if not file.name.lower().startswith(BESIDE)] or visible
    layers = ([file for file in data if inner_name(file).endswith(suffixes)] for suffixes in LAYERS)
    # The README beside a folder of Parquet files is not text to calibrate on; a folder of sources is.
    chosen = next(filter(None, layers), None) or [file for file in visible if looks_like_text(file)]
    if not chosen:
        raise Refusal(f"{purpose} text {folder}: none of its {len(visible)} files is text; {GIVE}")
    rest = [file.name for file in visible if file not in set(chosen)]
    left = f", {len(rest)} left out ({', '.join(rest[:3])}{', …' if len(rest) > 3 else ''})" if rest else ""
    reading.said[f"{len(chosen)} file{'s' if len(chosen) > 1 else ''}{left}"] = None
    return chosen


def _saved(folder: Path, name: str, reading: Reading) -> Reader | None:
    """How to read what `datasets` saved there by save_to_disk; of several splits it is train."""
    if (folder / "dataset_dict.json").is_file():
        splits = list(_json(folder / "dataset_dict.json", name).get("splits", []))
        if "train" not in splits and len(splits) != 1:
            where = f"{name}/{splits[0]}" if splits else "a split's"
            raise Refusal(f"{name}: holds the splits {', '.join(splits) or 'none'}; give one's folder, such as {where}")
        split = "train" if "train" in splits else splits[0]
        reading.said[f'split "{split}" of {", ".join(splits)}'] = None
        folder = folder / split
    if not (folder / "state.json").is_file():
        return None
    files = [folder / str(entry["filename"]) for entry in _json(folder / "state.json", name).get("_data_files", [])]
    for file in files:
        if not file.is_file():
            raise Refusal(f"{name}: {file.name}, which its state.json names, is missing; save or copy it again")
    return lambda columns: readable(rows(arrow_batches(files, columns)), name)


def _json(file: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise Refusal(f"{name}: {file.name} cannot be read: {error}") from None
    return content if isinstance(content, dict) else {}


# --- the hub ----------------------------------------------------------------------------------------------------------


def _hub_reader(repository: str, config: str | None, split: str | None, name: str) -> Reader:
    from datasets import load_dataset
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        # load_dataset alone would retry for half a minute before it says that there is no network.
        HfApi().dataset_info(repository, timeout=HUB_TIMEOUT_SECONDS)
    except GatedRepoError as error:
        raise Refusal(f"{name}: access is gated; accept its terms on the hub, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise Refusal(
            f"{name}: the hub has no such data set, or it is private (`hf auth login`), and there is no such file here"
        ) from error
    except OfflineModeIsEnabled as error:
        raise Refusal(
            f"{name}: no such file here, and HF_HUB_OFFLINE keeps the hub off; unset it, or give a local text, "
            "JSONL or Parquet file"
        ) from error
    except Exception as error:  # httpx, huggingface_hub and the operating system each have their own for "offline"
        raise Refusal(
            f"{name}: no such file here, and the Hugging Face hub cannot be reached ({first_line(error)}); "
            "give a local text, JSONL or Parquet file"
        ) from error

    def read(columns: Sequence[str] | None) -> Iterator[Record]:
        with tempfile.TemporaryDirectory(prefix="espalier-hub-") as cache:
            with refusing(name):
                records = load_dataset(repository, config, split=split or "train", streaming=True, cache_dir=cache)
                if columns is not None:
                    records = records.select_columns(list(columns))
                tables = iter(records.with_format("arrow").iter(batch_size=ROWS_PER_READ))
            yield from readable(rows(tables), name)

    return read
