"""Which column of a record holds the text: the one that is named, else the one that names and contents point to."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from espalier.stages.errors import Refusal
from espalier.stages.text.chat import is_conversation

Path = tuple[str, ...]  # of keys: ("data", "text") is written data.text

TEXT_NAMES = ("text", "content")
CHAT_NAMES = ("messages", "conversations", "conversation", "chat", "dialog")
ID_NAMES = ("input_ids", "token_ids")
MASK = "attention_mask"  # beside ids: 0 where they only fill up a row
OPTIONAL = ("input", "context", "system_prompt")
JOINED = (
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("system_prompt", "question", "response"),
    ("question", "answer"),
)
SHOWN = 12  # columns that a refusal lists


@dataclass(frozen=True, slots=True)
class Choice:
    """How a record's text, conversation or ids are taken from it; `columns` are all that is needed for that."""

    columns: tuple[str, ...] | None  # at the top; None where records are no objects
    take: Callable[[Any], Any]
    said: str


def kind_of(value: object) -> str:
    """What a value is to calibration: text, conversation, ids, or nothing; else the name of its kind."""
    if value is None or value == "" or value == []:
        return "nothing"
    if isinstance(value, str):
        return "text"
    if is_conversation(value):
        return "conversation"
    if isinstance(value, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return "ids"
    names = {bool: "boolean", int: "number", float: "number", dict: "object", list: "list", bytes: "bytes"}
    return names.get(type(value), type(value).__name__)


def choose(sample: Sequence[Any], wanted: str | None, name: str, required: bool = True) -> Choice:
    """How to take the text from records like these, `wanted` the column to take it from if one is named; where it is
    not `required`, records without such a column are read as if none were.

    In this order: the column named; text, content; conversations; input_ids; columns that belong together (JOINED); a
    nested text, content or conversation, if there is one; the only column of strings. Raises Refusal if none of these.
    """
    if not all(isinstance(record, Mapping) for record in sample):
        if wanted is not None and required:
            raise Refusal(f"{name}: text-column {wanted}: its records are no objects with columns; leave it out")
        return Choice(None, lambda record: record, "its strings")
    kinds = _kinds(sample)
    if wanted is not None and (required or any(".".join(path) == wanted for path in kinds)):
        return _wanted(kinds, wanted, name)
    if ("text",) in kinds:
        return _column(("text",))
    if _is(kinds, ("content",), "text"):
        return _column(("content",))
    pair = (("prompt",), ("completion",))
    if all(_is(kinds, path, "conversation") for path in pair):
        return Choice(("prompt", "completion"), _concatenated, 'columns "prompt" + "completion"')
    if chat := next(((column,) for column in CHAT_NAMES if _is(kinds, (column,), "conversation")), None):
        return _column(chat)
    if ids := next((column for column in ID_NAMES if _is(kinds, (column,), "ids")), None):
        return _ids(ids) if _is(kinds, (MASK,), "ids") else _column((ids,))
    return _joined(kinds) or _nested(kinds) or _only(kinds, name)


def _kinds(sample: Sequence[Mapping[str, Any]]) -> dict[Path, set[str]]:
    """What each path of keys holds over the sample, but for nothing."""
    kinds: dict[Path, set[str]] = {}
    for record in sample:
        for path, value in _leaves(record, ()):
            kinds.setdefault(path, set()).update({kind_of(value)} - {"nothing"})
    return kinds


def _leaves(record: Mapping[str, Any], above: Path) -> Iterator[tuple[Path, Any]]:
    for key, value in record.items():
        path = (*above, str(key))
        if isinstance(value, Mapping):
            yield from _leaves(value, path)
        else:
            yield path, value


def _is(kinds: Mapping[Path, set[str]], path: Path, kind: str) -> bool:
    return kinds.get(path) == {kind}


def _column(path: Path) -> Choice:
    return Choice(path[:1], lambda record: _at(record, path), f'column "{".".join(path)}"')


def _at(record: Any, path: Path) -> Any:
    for key in path:
        record = record.get(key) if isinstance(record, Mapping) else None
    return record


def _wanted(kinds: Mapping[Path, set[str]], wanted: str, name: str) -> Choice:
    path = next((path for path in kinds if ".".join(path) == wanted), None)
    if path is None:
        raise Refusal(f"{name}: text-column {wanted}: no such column, among: {_listed(kinds)}")
    if other := kinds[path] - {"text", "conversation", "ids"}:
        raise Refusal(f"{name}: text-column {wanted} holds {' and '.join(sorted(other))}, not text; name another")
    return _column(path)


def _ids(column: str) -> Choice:
    """A column of ids, less the padding."""

    def take(record: Mapping[str, Any]) -> list[int]:
        ids, mask = record.get(column) or [], record.get(MASK)
        return [one for one, seen in zip(ids, mask, strict=False) if seen] if mask else list(ids)

    return Choice((column, MASK), take, f'column "{column}" where {MASK} is 1')


def _concatenated(record: Mapping[str, Any]) -> list[Any]:
    return [*(record.get("prompt") or []), *(record.get("completion") or [])]


def _joined(kinds: Mapping[Path, set[str]]) -> Choice | None:
    for names in JOINED:
        columns = tuple(column for column in names if (column,) in kinds)
        there = [column for column in names if _is(kinds, (column,), "text")]
        if all(column in there or column in OPTIONAL for column in names):
            said = f"columns {' + '.join(columns)}, joined by line breaks"
            return Choice(columns, lambda record, columns=columns: _lines(record, columns), said)  # type: ignore[misc]
    return None


def _lines(record: Mapping[str, Any], columns: Sequence[str]) -> Any:
    """The columns' texts with a line break between two, unless there is a blank already; the first that is no text."""
    text = ""
    for column in columns:
        part = record.get(column)
        if part is None:
            continue
        if not isinstance(part, str):
            return part
        between = "\n" if text and part and not text[-1].isspace() and not part[0].isspace() else ""
        text += between + part
    return text


def _nested(kinds: Mapping[Path, set[str]]) -> Choice | None:
    for names, kind in ((TEXT_NAMES, "text"), (CHAT_NAMES, "conversation")):
        found = [path for path in kinds if path[-1] in names and _is(kinds, path, kind)]
        if len(found) == 1:
            return _column(found[0])
    return None


def _only(kinds: Mapping[Path, set[str]], name: str) -> Choice:
    texts = [path for path in kinds if _is(kinds, path, "text")]
    if len(texts) == 1:
        return _column(texts[0])
    raise Refusal(
        f'{name}: no column "text", and {len(texts) or "no"} string columns to take instead, among: {_listed(kinds)}; '
        "say which by --text-column"
    )


def _listed(kinds: Mapping[Path, set[str]]) -> str:
    shown = [f"{'.'.join(path)} ({' or '.join(sorted(kind)) or 'empty'})" for path, kind in kinds.items()]
    return ", ".join(shown[:SHOWN]) + (f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else "")


def ids_of(value: Sequence[int]) -> np.ndarray:
    """Token ids as int64; those that do not fit become -1, which no vocabulary has."""
    return np.array([item if -(2**63) <= item < 2**63 else -1 for item in value], dtype=np.int64)
