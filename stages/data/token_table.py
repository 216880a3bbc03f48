"""Text -> one memory-mapped Arrow table of token ids, (samples, length) int32, to calibrate or evaluate on.

Memory stays bounded whatever the size of the text: it is tokenised piece by piece, and the windows go to an unnamed
scratch file beside the table, from which the table is written in one go.
"""

import errno
import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

import numpy as np
import pyarrow as pa

from espalier.stages.data.tokenize import tokenised
from espalier.stages.errors import Refusal
from espalier.stages.storage.files import replacing
from espalier.stages.text import corpus
from espalier.stages.text.documents import Document, Reading
from espalier.stages.text.openings import Bos, Opening, headed, opening_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CANDIDATES = 16  # windows looked at for each one asked for
DIGEST_ROWS = 1024
ID = np.dtype("<i4")


class TokenTable:
    """A finished table of token ids: a read-only memory map, cheap to open and cheap to read at any row."""

    def __init__(self, path: Path, column: pa.FixedSizeListArray, metadata: dict[str, str]) -> None:
        self.path = path
        self.length = int(metadata["length"])
        self.purpose = metadata["purpose"]
        self.source = metadata["source"]
        self.digest = metadata["digest"]  # sha256 of the little-endian int32 bytes, row after row
        self.read = metadata.get("read", "")  # what was read and how, in a line for a person
        self.warnings: list[str] = json.loads(metadata.get("warnings", "[]"))
        self._ids: np.ndarray = column.flatten().to_numpy(zero_copy_only=True).reshape(len(column), self.length)

    @classmethod
    def open(cls, path: Path) -> "TokenTable":
        """The table in the file at `path`; raises Refusal if there is none, or if it is not a whole token table."""
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path), "r"))
            metadata = {key.decode(): value.decode() for key, value in (reader.schema.metadata or {}).items()}
            return cls(Path(path), reader.get_batch(0).column("tokens"), metadata)
        except FileNotFoundError as error:
            raise Refusal(f"token table {path}: no such file") from error
        except (pa.ArrowException, KeyError, IndexError, ValueError, OSError) as error:
            raise Refusal(
                f"token table {path}: not a whole token table ({error}); delete it and start again"
            ) from error

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def tokens(self) -> int:
        """Token ids in the table: samples x length."""
        return self._ids.size

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Samples start to stop - 1: int32 (n, length), a read-only view of the file, nothing copied."""
        return self._ids[start:stop]


def build_token_table(
    source: str | Path | Sequence[str] | Sequence[Sequence[int]],
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    length: int,
    samples: int | None,
    seed: int,
    path: Path,
    vocab_size: int,
    purpose: str = "calibration",
    bos: Bos = "auto",
    text_column: str | None = None,
    column_required: bool = True,
) -> TokenTable:
    """The table of `samples` windows of `length` token ids, written to `path` under a temporary name, then renamed.

    The text is cut into consecutive windows that do not overlap; what is left over at the end is dropped.
    `samples=None` keeps every window, in order. A number keeps that many, chosen by a permutation seeded with `seed`
    among the first 16 x samples windows (fewer if the text is shorter), in text order: the choice spreads over the text
    without reading a huge corpus whole.

    `source` is a text file; a .jsonl, .json, .csv, .tsv, .parquet or .arrow file, whose records hold text, a
    conversation or token ids in `text_column` or where `espalier.stages.text.columns.choose` finds them
    (`column_required=False`: in the column if there is such a one); any of these packed by gzip, zstd or bzip2; a
    folder of those, or one that `datasets` saved; a hub id "owner/name[:config][:split]"; a list of strings; or a list
    of token id lists. A text file, a record, a string, an id list is one document. Id lists that all have exactly
    `length` ids are the windows.

    `bos`: "document" puts the BOS before each document, "window" also at the head of each window (the text then moves
    on by one id less), "none" nowhere, with the end-of-text id, if there is one, between two documents; "auto" is
    document where the tokenizer itself begins a text with it, else none. Where it is there already, as from a chat
    template, none is added; token ids that are given get none.

    A document is tokenised in pieces of at most 128 k characters that end at a line break, each seen with a little of
    its neighbours: the ids are those of the whole document tokenised in one go, as long as no token reaches across such
    a line break. A text without line breaks is cut at a blank, or anywhere.

    Raises Refusal for a missing, empty, unreadable or too short source, and for an id outside [0, vocab_size).
    """
    name = f"{purpose} text {corpus.describe(source)}"
    _check_request(length, samples, name)
    reading = Reading(tokenizer, text_column, column_required)
    opening = Opening() if tokenizer is None else opening_of(tokenizer, bos, name)
    if _is_id_lists(source):
        documents = _given(cast(Sequence[Sequence[int]], source), purpose, length)
    else:
        documents = corpus.documents(cast(str | Path | Sequence[str], source), purpose, reading)
    stream = _id_stream(_readable(documents, tokenizer, purpose), tokenizer, opening)
    flat = headed(stream, length, opening) if opening.heads else (ids for ids, _ in stream)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=path.parent) as spool:
            limit = None if samples is None else CANDIDATES * samples
            found, held = _spool_windows(_checked(flat, vocab_size, name), spool, length, limit)
            reading.conclude()
            _check_enough(found, held, length, samples, name)
            windows = np.memmap(spool, dtype=ID, mode="r+", shape=(found, length))
            kept = found if samples is None else _keep_sample(windows, samples, seed)
            metadata = {"length": str(length), "samples": str(kept), "purpose": purpose, "source": str(_label(source))}
            facts = {"read": reading.account(name, opening), "warnings": json.dumps(reading.warnings)}
            _write(path, windows[:kept], metadata | facts)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Refusal(f"{path}: the disk is full; free some space or put the output elsewhere") from error
        raise
    return TokenTable.open(path)


def _check_request(length: int, samples: int | None, name: str) -> None:
    if length < 2:
        raise Refusal(
            f"{name}: length {length} is too short; a window needs at least 2 tokens to predict one from another"
        )
    if samples is not None and samples < 1:
        raise Refusal(f"{name}: {samples} samples asked for; ask for at least 1")


def _check_enough(found: int, held: int, length: int, samples: int | None, name: str) -> None:
    if held == 0:
        raise Refusal(f"{name} is empty; give text to work on")
    amount = f"{name} holds {_grouped(held)} tokens = {found} window{'' if found == 1 else 's'} of {length}"
    if found == 0:
        raise Refusal(
            f"{amount}; give more text, or a length of at most {held}" if held > 1 else f"{amount}; give more text"
        )
    if samples is not None and found < samples:
        raise Refusal(
            f"{amount}, fewer than the {samples} samples x {length} asked for; give more text, or --samples {found}"
        )


def _grouped(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def _label(source: str | Path | Sequence[object]) -> str:
    return str(source) if isinstance(source, str | Path) else corpus.describe(source)


def _is_id_lists(source: object) -> bool:
    return (
        not isinstance(source, str | Path)
        and len(cast(Sequence[object], source)) > 0
        and not any(isinstance(item, str) for item in cast(Sequence[object], source))
    )


# --- documents -> ids -------------------------------------------------------------------------------------------------


def _id_stream(
    documents: Iterator[Document], tokenizer: "PreTrainedTokenizerBase | None", opening: Opening
) -> Iterator[tuple[np.ndarray, bool]]:
    """The ids of the documents in order, int64, with what opens each of them or stands between two; and whether a
    document was given as ids."""
    last: Document | None = None
    for part in tokenised(documents, tokenizer):
        if part.opens and not part.document.whole:
            if opening.ids.size and part.document.ids is None:
                if not opening.begins(part.ids):
                    yield opening.ids, False
            elif last is not None and not last.whole and not opening.begins(part.ids):
                yield opening.end, part.document.ids is not None
        yield part.ids, part.document.ids is not None
        last = part.document


def _readable(
    documents: Iterator[Document], tokenizer: "PreTrainedTokenizerBase | None", purpose: str
) -> Iterator[Document]:
    for document in documents:
        if document.ids is None and tokenizer is None:
            raise Refusal(f"{purpose} text needs the model's tokenizer; without one, give lists of token ids")
        yield document


def _given(lists: Sequence[Sequence[int]], purpose: str, length: int) -> Iterator[Document]:
    as_they_are = all(len(ids) == length for ids in lists)
    for index, ids in enumerate(lists):
        array = np.asarray(ids)
        if array.size == 0:
            continue
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise Refusal(f"{purpose} id list {index} does not hold plain integers; give a list of token id lists")
        yield Document(ids=array.astype(np.int64), whole=as_they_are)


# --- ids -> windows -> file -------------------------------------------------------------------------------------------


def _checked(stream: Iterator[np.ndarray], vocab_size: int, name: str) -> Iterator[np.ndarray]:
    for ids in stream:
        if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
            wrong = int(ids[(ids < 0) | (ids >= vocab_size)][0])
            rule = "negative" if wrong < 0 else f"beyond the model's vocabulary of {vocab_size}"
            raise Refusal(f"{name}: token id {wrong} is {rule}; this tokenizer and this model do not belong together")
        yield ids.astype(ID)


def _spool_windows(stream: Iterator[np.ndarray], spool: IO[bytes], length: int, limit: int | None) -> tuple[int, int]:
    """(whole windows written to the spool, ids seen); reads no further than `limit` windows."""
    held = written = 0
    most = None if limit is None else limit * length
    for ids in stream:
        held += ids.size
        ids = ids if most is None else ids[: most - written]
        spool.write(ids.tobytes())
        written += ids.size
        if written == most:
            break
    spool.flush()
    return written // length, held


def _keep_sample(windows: np.ndarray, samples: int, seed: int) -> int:
    """Moves the chosen windows to the front, in text order, and returns how many there are."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(windows))[:samples])
    for start in range(0, samples, DIGEST_ROWS):
        block = chosen[start : start + DIGEST_ROWS]
        windows[start : start + len(block)] = windows[block]  # chosen[i] >= i: none is overwritten before it is read
    return samples


def _write(path: Path, rows: np.ndarray, metadata: dict[str, str]) -> None:
    """Writes the Arrow IPC file under a temporary name, syncs it, renames it: whole or not there."""
    digest = hashlib.sha256()
    for start in range(0, len(rows), DIGEST_ROWS):
        digest.update(rows[start : start + DIGEST_ROWS].tobytes())
    values = pa.Array.from_buffers(pa.int32(), rows.size, [None, pa.py_buffer(rows)])
    column = pa.FixedSizeListArray.from_arrays(values, rows.shape[1])
    schema = pa.schema([pa.field("tokens", column.type)], metadata={**metadata, "digest": digest.hexdigest()})
    with replacing(path) as temporary, temporary.open("wb") as file:
        options = pa.ipc.IpcWriteOptions(allow_64bit=True)
        # One batch, so that any span of rows is one stretch of the file and needs no copy.
        with pa.ipc.new_file(file, schema, options=options) as writer:
            writer.write_batch(pa.record_batch([column], schema=schema))
