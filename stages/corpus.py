"""Where calibration and evaluation text comes from: files, folders, hub data sets and Python lists, as documents.

A document is an iterator over blocks of text, so that one document may be larger than memory. Records (JSON Lines,
JSON, Parquet, hub) are read through `datasets` streaming. A text file is read here, byte by byte accounted for:
`datasets` would read a file without line breaks whole, and cannot say at which byte a file stops being UTF-8.
"""

import codecs
import glob
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet

from stages.errors import Refusal

if TYPE_CHECKING:
    from datasets import IterableDataset

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz")
PARQUET_SUFFIXES = (".parquet",)
BLOCK = 1 << 20  # bytes of a file, or characters of a string, taken up at once
RECORDS_PER_READ = 64
HUB_TIMEOUT_SECONDS = 4.0
HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?")


def documents(source: str | Path | Sequence[str], purpose: str) -> Iterator[Iterable[str]]:
    """The documents of `source` in order, each as an iterator over its text; see `build_token_table` for the kinds.

    Raises Refusal, in words that name `purpose` ("calibration", "evaluation") and the file, for what cannot be read.
    """
    if not isinstance(source, str | Path):
        for index, text in enumerate(source):
            if not isinstance(text, str):
                raise Refusal(f"{purpose} text {index} of the list is of type {type(text).__name__}, not a string")
            if not _encodable(text):
                raise Refusal(f"{purpose} text {index} of the list holds a lone surrogate, which no tokenizer takes")
            yield _blocks(text)
        return
    path = Path(source).expanduser()
    if path.exists() and str(source):  # Path("") would be the current folder
        for file in _files(path, purpose):
            yield from _file_documents(file, f"{purpose} text {file.name}")
        return
    match = HUB_ID.fullmatch(str(source))
    if match is None or path.suffix in (".txt", ".md", *JSON_SUFFIXES, *PARQUET_SUFFIXES) or path.parent.is_dir():
        raise Refusal(
            f'{purpose} text "{source}": no such file or folder; give a text, JSONL or Parquet file, a folder of '
            "those, or a hub data set as owner/name[:config][:split]"
        )
    yield from _hub_documents(match["name"], match["config"], match["split"], f"{purpose} data set {source}")


def describe(source: str | Path | Sequence[object]) -> str:
    """The source in a few words for messages: a file's name, a hub id, or what the list holds."""
    if isinstance(source, str | Path):
        path = Path(source)
        return path.name if path.expanduser().exists() else str(source)
    if not len(source):
        return "(an empty list)"
    return f"(a list of {len(source)} {'texts' if isinstance(source[0], str) else 'id lists'})"


def _files(path: Path, purpose: str) -> list[Path]:
    """The file itself; of a folder every .parquet, .json(l) and .txt file, or, if it has none of these, every file."""
    if not path.is_dir():
        return [path]
    visible = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not visible:
        raise Refusal(f"{purpose} text {path}: the folder holds no files")
    # The README beside a folder of Parquet files is not text to calibrate on; a folder of sources is.
    known = [file for file in visible if file.name.endswith((".txt", *JSON_SUFFIXES, *PARQUET_SUFFIXES))]
    return known or visible


def _file_documents(file: Path, name: str) -> Iterator[Iterable[str]]:
    if file.name.endswith((*JSON_SUFFIXES, *PARQUET_SUFFIXES)):
        if file.stat().st_size:
            yield from _record_documents(file, name)
    else:
        yield _text_blocks(file, name)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _blocks(text: str) -> Iterator[str]:
    return (text[start : start + BLOCK] for start in range(0, len(text), BLOCK))


def _text_blocks(file: Path, name: str) -> Iterator[str]:
    """The text of a UTF-8 file in blocks of about 1 MiB, its line breaks as they are."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    consumed = 0
    try:
        with file.open("rb") as handle:
            if handle.read(3) == codecs.BOM_UTF8:
                raise Refusal(
                    f"{name}: a UTF-8 byte order mark at byte offset 0 would become a token of its own; "
                    "save the file without it (for instance: sed -i '1s/^\\xEF\\xBB\\xBF//' FILE)"
                )
            handle.seek(0)
            while block := handle.read(BLOCK):
                pending = len(decoder.getstate()[0])
                yield _decoded(decoder, block, consumed - pending, name)
                consumed += len(block)
            _decoded(decoder, b"", consumed - len(decoder.getstate()[0]), name, final=True)
    except OSError as error:
        raise Refusal(f"{name}: cannot be read: {error.strerror or error}") from error


def _decoded(decoder: codecs.IncrementalDecoder, block: bytes, start: int, name: str, final: bool = False) -> str:
    """The text of `block`, whose first undecoded byte is byte `start` of the file."""
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        raise Refusal(
            f"{name}: not UTF-8 at byte offset {start + error.start} ({error.reason}, "
            f"byte 0x{error.object[error.start]:02x}); convert the file to UTF-8 (iconv -f latin1 -t utf-8)"
        ) from error


def _record_documents(file: Path, name: str) -> Iterator[Iterable[str]]:
    # Imported where used: a shard that only opens a finished token table need not carry pandas and fsspec along.
    from datasets import load_dataset

    options: dict[str, Any] = {"data_files": glob.escape(str(file)), "split": "train", "streaming": True}
    with _readable(name):
        if file.name.endswith(PARQUET_SUFFIXES):
            column = _text_column(pa.parquet.read_schema(file), name)
            # Without batch_size it reads a row group at a time, often a million records.
            records = load_dataset("parquet", columns=[column], batch_size=RECORDS_PER_READ, **options)
        else:
            records = load_dataset("json", **options)
    yield from _texts(records, name)


def _hub_documents(repository: str, config: str | None, split: str | None, name: str) -> Iterator[Iterable[str]]:
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
            f"{name}: no such file here, and the Hugging Face hub cannot be reached ({_first_line(error)}); "
            "give a local text, JSONL or Parquet file"
        ) from error
    with _readable(name):
        records = load_dataset(repository, config, split=split or "train", streaming=True)
    yield from _texts(records, name)


def _texts(records: "IterableDataset", name: str) -> Iterator[Iterable[str]]:
    """Column "text" of the records, or their only string column, a document each; empty records are left out."""
    tables = iter(records.with_format("arrow").iter(batch_size=RECORDS_PER_READ))
    with _readable(name):
        first = next(tables, None)
    if first is None:
        return
    column = _text_column(first.schema, name)
    for table in _readable_all(chain([first], tables), name):
        values = table.column(column)
        if not (_is_string(values.type) or pa.types.is_null(values.type)):
            raise Refusal(f'{name}: column "{column}" holds {values.type}, not strings')
        for text in values.to_pylist():
            if text:
                yield _blocks(text)


def _text_column(schema: pa.Schema, name: str) -> str:
    strings = [field.name for field in schema if _is_string(field.type)]
    if "text" in schema.names:
        return "text"
    if len(strings) == 1:
        return strings[0]
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    raise Refusal(
        f'{name}: no column "text", and {len(strings) or "no"} string columns to take instead, among: {columns}; '
        'rename the column that holds the text to "text"'
    )


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _readable_all(tables: Iterator[pa.Table], name: str) -> Iterator[pa.Table]:
    while True:
        with _readable(name):
            table = next(tables, None)
        if table is None:
            return
        yield table


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turns what `datasets` and Arrow raise about the data into a Refusal, and keeps their own log line out."""
    log = logging.getLogger("datasets")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except Refusal:
        raise
    except StopIteration:  # how `datasets` says that a JSON file holds no record
        raise Refusal(f"{name}: holds no records") from None
    except Exception as error:
        raise Refusal(f"{name}: cannot be read: {_first_line(error)}") from error
    finally:
        log.setLevel(level)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
