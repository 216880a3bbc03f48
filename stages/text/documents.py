"""The documents of a calibration text, and the sentence that says how they were read."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from espalier.stages.errors import Refusal
from espalier.stages.text.chat import Conversations
from espalier.stages.text.columns import Choice, choose, ids_of, kind_of
from espalier.stages.text.openings import Opening
from espalier.stages.text.records import ROWS_PER_READ, Reader
from espalier.stages.text.text_file import BLOCK

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FEW = 3  # records of which nothing can be said
LONG = 64  # characters, beyond which a string without blanks is taken for text: not all scripts have blanks


@dataclass(frozen=True, slots=True)
class Document:
    """One document: its text in blocks, so that it may be larger than memory, or its token ids."""

    text: Iterable[str] = ()
    ids: np.ndarray | None = None  # int64
    whole: bool = False  # with all that begins and ends it: a chat template's text, a row of a table of ids


@dataclass(slots=True)
class Reading:
    """How a source is to be read, and what came of it."""

    tokenizer: "PreTrainedTokenizerBase | None"
    text_column: str | None = None
    column_required: bool = True
    said: dict[str, None] = field(default_factory=dict)  # how things were read, in order, once each
    warnings: list[str] = field(default_factory=list)
    conversations: Conversations = field(init=False)
    beginnings: bool = False  # whether there was text that begins as the tokenizer has it
    doubts: "dict[str, _Doubt]" = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.conversations = Conversations(self.tokenizer)

    def of(self, text: str, where: str) -> Document:
        """A string as a document. Raises Refusal for one that is no Unicode."""
        _sound(text, where)
        self.beginnings = True
        return Document(blocks_of(text))

    def no_columns(self, name: str) -> None:
        """Raises Refusal if a column is named of what has none."""
        if self.text_column is not None and self.column_required:
            raise Refusal(f"{name}: text-column {self.text_column}: plain text has no columns; leave it out")

    def records(self, reader: Reader, name: str) -> Iterator[Document]:
        """The records' documents; those that hold nothing are left out. Raises Refusal for a record without text."""
        begun = self._begun(reader, name)
        if begun is None:
            return
        choice, packed = begun
        doubt = self.doubts.setdefault(f"{name}: {choice.said}", _Doubt())
        for place, record in reader(choice.columns):
            document = self._document(choice.take(record), f"{name}: {place}", choice.said, packed, doubt)
            if document is not None:
                yield document

    def _begun(self, reader: Reader, name: str) -> tuple[Choice, bool] | None:
        """From the first records: what to take of each, and whether those are rows of ids of one length."""
        sample = [value for _, value in islice(reader(None), ROWS_PER_READ)]
        if not sample:
            return None
        choice = choose(sample, self.text_column, name, self.column_required)
        values = [choice.take(record) for record in sample]
        kinds = {kind_of(value) for value in values}
        how = {"conversation": f", {self.conversations.said}", "ids": " as token ids"}
        self.said[choice.said + "".join(words for kind, words in how.items() if kind in kinds)] = None
        return choice, len({len(value) for value in values if kind_of(value) == "ids"}) == 1

    def _document(self, value: Any, where: str, said: str, packed: bool, doubt: "_Doubt") -> Document | None:
        kind = kind_of(value)
        if kind == "nothing":
            return None
        if kind == "text":
            doubt.look(value)
            return self.of(value, where)
        if kind == "ids":
            return Document(ids=ids_of(value), whole=packed)
        if kind != "conversation":
            raise Refusal(f"{where}: {said} holds {kind}, not text; mend it, or name another by --text-column")
        text = self.conversations.text(value, where)
        if not text:
            return None
        if self.conversations.template is None:
            return self.of(text, where)
        return Document(blocks_of(_sound(text, where)), whole=True)

    def file(self, blocks: Iterable[str], name: str) -> Document:
        """A text file's blocks as a document. Raises Refusal if it is to have columns."""
        self.no_columns(name)
        self.said["as plain text"], self.beginnings = None, True
        return Document(blocks)

    def account(self, name: str, opening: Opening) -> str:
        """What was read and how, in a line; nothing for lists, which are what they are."""
        if not self.said:
            return ""
        begun = f"; {opening.said}" if self.beginnings or opening.heads else ""
        return f"{name}: read {', '.join(self.said)}{begun}"

    def conclude(self) -> None:
        """What can be said only once all is read goes to `warnings`. Raises Refusal if no conversation could be."""
        self.warnings += [f"{said} {doubt.said}" for said, doubt in self.doubts.items() if doubt.said]
        chats = self.conversations
        if not chats.refused:
            return
        if not chats.rendered:
            raise Refusal(f"{chats.reason}: the chat template takes none of the conversations; mend their turns")
        total = chats.refused + chats.rendered
        self.warnings.append(
            f"{chats.refused} of {total} conversations left out, as the chat template refuses them ({chats.reason})"
        )


@dataclass(slots=True)
class _Doubt:
    """Whether a column's strings are plainly no text."""

    seen: int = 0
    first: str = ""
    same: bool = True
    single: bool = True  # words, each, and short

    def look(self, text: str) -> None:
        self.first = text if not self.seen else self.first
        self.seen += 1
        self.same = self.same and text == self.first
        self.single = self.single and len(text) <= LONG and len(text.split()) < 2

    @property
    def said(self) -> str:
        if self.seen < FEW or not (self.same or self.single):
            return ""
        what = f'holds "{self.first[:30]}" in every record' if self.same else "holds single words"
        return f"{what}: is that text? If not, say which column is by --text-column"


def _sound(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refusal(f"{where} holds a lone surrogate, which no tokenizer takes") from None
    return text


def blocks_of(text: str) -> Iterator[str]:
    """The text in blocks of about a million characters."""
    return (text[start : start + BLOCK] for start in range(0, len(text), BLOCK))
