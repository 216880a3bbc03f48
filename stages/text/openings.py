"""Beginning-of-sequence tokens: where the tokenizer's own rule puts a BOS, before documents or in each window."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from espalier.stages.errors import Refusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Bos = Literal["auto", "document", "window", "none"]
NONE = np.array([], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Opening:
    """`ids` before every document, in place of the end-of-text id between two; `heads`: at every window's head too."""

    ids: np.ndarray = field(default_factory=lambda: NONE)  # int64; none: `end` stands between documents
    end: np.ndarray = field(default_factory=lambda: NONE)  # int64, the end-of-text id or nothing
    heads: bool = False
    said: str = ""

    def begins(self, ids: np.ndarray) -> bool:
        """Whether the ids begin with the opening as they are."""
        return bool(self.ids.size) and np.array_equal(ids[: self.ids.size], self.ids)


def opening_of(tokenizer: "PreTrainedTokenizerBase", bos: Bos, name: str) -> Opening:
    """What `bos` means with this tokenizer. auto: before each document, if the tokenizer itself begins a text so.

    Raises Refusal if a BOS is asked for and the tokenizer has none.
    """
    end = _ids([getattr(tokenizer, "eos_token_id", None)])
    own = _own(tokenizer)
    ids = NONE if bos == "none" or (bos == "auto" and not own.size) else own
    if bos in ("document", "window") and not own.size:
        ids = _ids([getattr(tokenizer, "bos_token_id", None)])
        if not ids.size:
            raise Refusal(f"{name}: bos {bos}: the model's tokenizer has no BOS token; leave --bos out")
    if not ids.size:
        between = f", {_written(tokenizer, end)} between documents" if end.size else ""
        return Opening(end=end, said=f"no BOS{between}")
    where = "at the head of each window and document" if bos == "window" else "before each document"
    return Opening(ids, end, bos == "window", f"{_written(tokenizer, ids)} {where}")


def _own(tokenizer: Any) -> np.ndarray:
    """What the tokenizer puts before a text by its own rule."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    before = next((at for at in range(len(ids)) if ids[at : at + len(plain)] == plain), 0) if plain else 0
    return _ids(ids[:before])


def _ids(ids: list[Any]) -> np.ndarray:
    return np.array([one for one in ids if one is not None], dtype=np.int64)


def _written(tokenizer: Any, ids: np.ndarray) -> str:
    return "".join(map(str, tokenizer.convert_ids_to_tokens(ids.tolist())))


def headed(stream: Iterator[tuple[np.ndarray, bool]], length: int, opening: Opening) -> Iterator[np.ndarray]:
    """The stream with the opening at the head of every window of `length` ids that does not begin with it already.

    Of the stream's (ids, whether they were given as ids) what was given stays as it is.
    """
    room = 0  # ids that the window still takes
    for ids, given in stream:
        at = 0
        while at < ids.size:
            if room == 0:
                room = length
                if not given and not opening.begins(ids[at:]):
                    yield opening.ids[:length]
                    room -= min(opening.ids.size, length)
            piece = ids[at : at + room]
            if piece.size:
                yield piece
            at, room = at + piece.size, room - piece.size
