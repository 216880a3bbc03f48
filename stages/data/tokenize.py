"""Documents of any size -> token ids, in pieces, as if each document had been tokenised in one go.

Tokenising a whole document at once takes about a hundred times its size in memory, so it is cut at line breaks, and
each piece is shown to the tokenizer with a few characters of its neighbours, whose tokens are then taken off again.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from espalier.stages.text.documents import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 128 * 1024  # characters tokenised in one go
CONTEXT = 64  # characters of the neighbouring pieces shown to the tokenizer, so that it cuts as in the whole text
BATCH = 8 * PIECE  # characters handed to the tokenizer's threads at once
BATCH_PIECES = 4096  # and no more documents than this, however short


@dataclass(frozen=True)
class _Piece:
    """Part of a document, with the little of its neighbours that the tokenizer sees too."""

    before: str
    text: str
    after: str
    opens_document: bool


@dataclass(frozen=True, slots=True)
class Part:
    """Ids of a document, all or some of them, in order."""

    ids: np.ndarray  # int64
    document: Document
    opens: bool  # whether they are the document's first


def tokenised(documents: Iterator[Document], tokenizer: "PreTrainedTokenizerBase | None") -> Iterator[Part]:
    """The documents' ids; those of documents that are ids already are as they were given."""
    pieces = ((document, piece) for document in documents for piece in _pieces_of(document))
    for batch in _batches(pieces):
        texts = [piece.before + piece.text + piece.after for document, piece in batch if document.ids is None]
        if texts and tokenizer is not None:
            encoded = _encode(texts, tokenizer)
        index = -1
        for document, piece in batch:
            if document.ids is not None:
                yield Part(document.ids, document, True)
                continue
            index += 1
            ids = encoded["input_ids"][index]
            if piece.before or piece.after:
                span = _own_tokens(encoded.encodings[index], piece) if encoded.encodings else None
                ids = ids[span] if span else _encode([piece.text], tokenizer)["input_ids"][0]
            yield Part(np.array(ids, dtype=np.int64), document, piece.opens_document)


def _pieces_of(document: Document) -> Iterable[_Piece]:
    return _pieces(document.text) if document.ids is None else [_Piece("", "", "", opens_document=True)]


def _encode(texts: list[str], tokenizer: Any) -> Any:
    # verbose=False: a corpus is longer than any model's context, which is no cause for a warning here.
    return tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )


def _own_tokens(encoding: Any, piece: _Piece) -> slice | None:
    """Which tokens are the piece's own and not its neighbours'; None if a token straddles the border."""
    start, stop = len(piece.before), len(piece.before) + len(piece.text)
    first = encoding.char_to_token(start)
    last = encoding.char_to_token(stop) if piece.after else len(encoding.ids)
    if first is None or last is None or encoding.token_to_chars(first)[0] != start:
        return None
    if piece.after and encoding.token_to_chars(last)[0] != stop:
        return None
    return slice(first if piece.before else 0, last)


def _pieces(blocks: Iterable[str]) -> Iterator[_Piece]:
    """The document in pieces of at most PIECE characters; where it is cut does not depend on how the blocks fall."""
    buffer, before = "", ""
    for block in blocks:
        buffer += block
        while len(buffer) >= PIECE + CONTEXT:
            cut = _cut(buffer)
            yield _Piece(before, buffer[:cut], buffer[cut : cut + CONTEXT], opens_document=not before)
            before, buffer = buffer[max(0, cut - CONTEXT) : cut], buffer[cut:]
    if buffer:
        yield _Piece(before, buffer, "", opens_document=not before)


def _cut(text: str) -> int:
    """Where to end a piece: before a line that starts with no blank, else after a line break, else before a blank.

    Tokenizers treat runs of blanks and line breaks as one thing, so the first of these leaves their tokens alone.
    """
    end = PIECE
    while (newline := text.rfind("\n", PIECE // 2, end)) >= 0:
        if not text[newline + 1].isspace():
            return newline + 1
        end = newline
    if (newline := text.rfind("\n", PIECE // 2, PIECE)) >= 0:
        return newline + 1
    blank = text.rfind(" ", PIECE // 2, PIECE)
    return blank if blank > 0 else PIECE


def _batches(pieces: Iterator[tuple[Document, _Piece]]) -> Iterator[list[tuple[Document, _Piece]]]:
    """Pieces in lists of about BATCH characters: enough for the tokenizer's threads, little enough for memory."""
    batch: list[tuple[Document, _Piece]] = []
    characters = 0
    for document, piece in pieces:
        batch.append((document, piece))
        characters += len(piece.text) if document.ids is None else document.ids.size
        if characters >= BATCH or len(batch) == BATCH_PIECES:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
