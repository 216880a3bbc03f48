"""Records of a file, one at a time and with their place in it: JSON Lines, JSON, Parquet, Arrow, CSV."""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from json import JSONDecodeError, JSONDecoder
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from espalier.stages.errors import Refusal
from espalier.stages.text.text_file import BLOCK, inner_name, text_blocks, unpacked

Record = tuple[str, Any]  # where it is, such as "line 7", and what it is
# Called with the columns that are needed, or None for all; each call begins again with the first record.
Reader = Callable[[Sequence[str] | None], Iterator[Record]]

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = (".csv", ".tsv")
ARROW_SUFFIXES = (".parquet", ".arrow")
ROWS_PER_READ = 64
GAP, GAP_IN_ARRAY = re.compile(r"[ \t\r\n]*"), re.compile(r"[ \t\r\n,]*")
UNSURE = 12  # characters before the end of what has been read, in which JSON may only seem wrong: `tru`, `\\u00`


def reader_of(file: Path, name: str) -> Reader | None:
    """How to read the file's records, by its name; None if it is a text. Refusals will begin with `name`."""
    kind = inner_name(file)
    if kind.endswith(JSON_SUFFIXES):
        return lambda _: _json(file, name)
    if kind.endswith(TABLE_SUFFIXES):
        return lambda columns: readable(_table(file, "\t" if kind.endswith(".tsv") else ",", columns), name)
    if kind.endswith(".parquet"):
        return lambda columns: readable(rows(_parquet(file, columns)), name)
    if kind.endswith(".arrow"):
        return lambda columns: readable(rows(arrow_batches([file], columns)), name)
    return None


def _json(file: Path, name: str) -> Iterator[Record]:
    """The values of JSON Lines, of one array, or of objects one behind the other, however many lines each takes.

    Python's own parser, value by value: Arrow's takes a column's type from its first rows and refuses what differs.
    """
    blocks, decoder = text_blocks(file, name), JSONDecoder()
    text, at, line, array, begun = next(blocks, ""), 0, 1, False, False
    while True:
        start = at
        at = (GAP_IN_ARRAY if array else GAP).match(text, at).end()  # type: ignore[union-attr]
        line += text.count("\n", start, at)
        if at == len(text):
            text, at = next(blocks, ""), 0
            if text:
                continue
            if array:
                raise Refusal(f"{name}: cannot be read: line {line}: the array that it holds does not end")
            return
        if text[at] == "[" and not begun:
            while not text[at + 1 :].strip() and (more := next(blocks, "")):
                text += more
            array, begun = _opens_array_of_values(text, at), True
            at += 1 if array else 0
            continue
        if array and text[at] == "]":
            array, at = False, at + 1
            continue
        begun = True
        try:
            value, end = decoder.raw_decode(text, at)
        except JSONDecodeError as error:
            more = "" if _surely_wrong(error, text) else _at_least(len(text) - at, blocks)
            if not more:
                place = line + text[at : error.pos].rstrip().count("\n")
                raise Refusal(f"{name}: cannot be read: line {place}: {error.msg}; mend that line") from None
            text, at = text[at:] + more, 0
            continue
        except RecursionError:
            raise Refusal(f"{name}: cannot be read: line {line}: nested too deeply") from None
        yield f"line {line}", value
        line += text.count("\n", at, end)
        at = end


def _opens_array_of_values(text: str, at: int) -> bool:
    """Whether `[` begins one array of records, rather than the first of JSON Lines that are arrays themselves."""
    following = GAP.match(text, at + 1).end()  # type: ignore[union-attr]
    return text[following : following + 1] in ("{", '"', "[", "]", "")


def _surely_wrong(error: JSONDecodeError, text: str) -> bool:
    return not error.msg.startswith("Unterminated string") and error.pos < len(text) - UNSURE


def _at_least(characters: int, blocks: Iterator[str]) -> str:
    """So much more of the text, if there is as much: a record is read again at each doubling only."""
    parts: list[str] = []
    while sum(map(len, parts)) < characters and (block := next(blocks, "")):
        parts.append(block)
    return "".join(parts)


def _parquet(file: Path, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    # A buffer of its own a column, so that a row group of a million records is not read whole.
    with pa.parquet.ParquetFile(file, buffer_size=BLOCK, pre_buffer=False) as parquet:
        yield from parquet.iter_batches(ROWS_PER_READ, columns=None if columns is None else list(columns))


def arrow_batches(files: Sequence[Path], columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    """The batches of Arrow files, streams (as `datasets` writes them) or not, in the order of the files."""
    for file in files:
        with pa.memory_map(str(file)) as source:
            try:
                yield from _selected(iter(pa.ipc.open_stream(source)), columns)
            except pa.ArrowInvalid:
                source.seek(0)
                whole = pa.ipc.open_file(source)
                numbers = range(whole.num_record_batches)
                yield from _selected((whole.get_batch(number) for number in numbers), columns)


def _selected(batches: Iterator[pa.RecordBatch], columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        yield batch if columns is None else batch.select(list(columns))


def _table(file: Path, delimiter: str, columns: Sequence[str] | None) -> Iterator[Record]:
    """The rows of a CSV file, its header first. What its first rows take for numbers stays one; the rest is text."""
    convert = pa.csv.ConvertOptions()
    if columns is not None:  # as text: a later row may hold what its first rows do not
        convert = pa.csv.ConvertOptions(include_columns=list(columns), column_types=dict.fromkeys(columns, pa.string()))
    parse = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    with file.open("rb") as handle:
        yield from rows(iter(pa.csv.open_csv(unpacked(handle), parse_options=parse, convert_options=convert)))


def rows(batches: Iterator[Any]) -> Iterator[Record]:
    """The rows of record batches or tables as Python values, so many at a time."""
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_PER_READ):
            for value in batch.slice(start, ROWS_PER_READ).to_pylist():
                number += 1
                yield f"row {number}", value


def readable(records: Iterator[Record], name: str) -> Iterator[Record]:
    """The records; what `datasets` and Arrow raise about them becomes a Refusal."""
    while True:
        with refusing(name):
            record = next(records, None)
        if record is None:
            return
        yield record


@contextmanager
def refusing(name: str) -> Iterator[None]:
    """Turns what `datasets` and Arrow raise about the data into a Refusal, and keeps their own log line out."""
    log = logging.getLogger("datasets")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except Refusal:
        raise
    except Exception as error:
        raise Refusal(f"{name}: cannot be read: {first_line(error)}") from error
    finally:
        log.setLevel(level)


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
