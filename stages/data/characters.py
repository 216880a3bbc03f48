"""Text as characters: a tokenizer whose tokens are the characters of a text, and windows that may begin anywhere."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from espalier.stages.data.token_table import TokenTable
from espalier.stages.errors import Refusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

UNKNOWN = "<unk>"  # the last token: what the text that the tokenizer was made from does not have


def character_tokenizer(text: str) -> "PreTrainedTokenizerFast":
    """A tokenizer of one token a character: those of `text` in the order of their code points, then UNKNOWN."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: number for number, character in enumerate(sorted(set(text)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary | {UNKNOWN: len(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN, clean_up_tokenization_spaces=False)


def split_text(path: Path, held_out: float) -> tuple[str, str]:
    """The text file's beginning and its last `held_out` (a share of its characters), as nanoGPT splits it.

    Raises Refusal if the file is missing, empty or not UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")  # bytes, so that line breaks stay as they are
    except FileNotFoundError:
        raise Refusal(f"data {path}: no such file; give a text file by --data FILE") from None
    except (IsADirectoryError, PermissionError) as error:
        raise Refusal(f"data {path}: cannot be read ({error.strerror}); give a text file by --data FILE") from None
    except UnicodeDecodeError as error:
        raise Refusal(f"data {path}: not UTF-8 text (byte {error.start}); give plain text") from None
    if not text:
        raise Refusal(f"data {path}: empty; give a text file by --data FILE")
    cut = int(len(text) * (1 - held_out))
    return text[:cut], text[cut:]


class SlidingWindows:
    """Every window of `length` tokens of a token table read as one text, wherever it begins: as many as there are
    tokens, where consecutive windows would give a `length`-th of that. What nanoGPT draws its batches from.

    The ids `head`, a BOS say, are the first of each window; the text then has so many fewer."""

    def __init__(self, path: str, length: int, head: Sequence[int] = ()) -> None:
        table = TokenTable.open(Path(path))
        self._ids = table.rows(0, len(table)).reshape(-1)  # a view of the file: rows lie one behind the other
        self._head = np.array(head, dtype=np.int64)
        self._text = length - len(head)  # ids of the text in a window

    def __len__(self) -> int:
        return len(self._ids) - self._text + 1

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """input_ids and labels, the same int64 (windows, length); the model shifts the labels itself."""
        starts = np.asarray(indices)[:, None] + np.arange(self._text)
        heads = np.broadcast_to(self._head, (len(starts), len(self._head)))
        ids = torch.from_numpy(np.concatenate([heads, self._ids[starts]], axis=1))
        return {"input_ids": ids, "labels": ids}
