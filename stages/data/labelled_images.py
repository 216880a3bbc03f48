"""Pictures that show a quantity, and a CSV that says which: examples for a model that is to read the number.

An example is the picture, a question, and the number as text; only the number, and the end of the text after it, are
to be predicted.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from espalier.stages.data.captions import open_image
from espalier.stages.data.image_samples import BY_TOKEN, load_processor
from espalier.stages.data.training_batches import IGNORED
from espalier.stages.errors import Refusal

COLUMNS = ("file", "quantity")  # a third, `unit`, is for people
CACHE_BYTES = 512 << 20  # of processed examples kept in memory; later ones are processed each time


@dataclass(frozen=True, slots=True)
class Labelled:
    """One picture and the number on it."""

    path: Path
    quantity: float

    @property
    def answer(self) -> str:
        """What the model is to say: the number, without a decimal point where there is nothing behind it."""
        return f"{self.quantity:.10g}"


def read_labels(folder: Path) -> list[Labelled]:
    """The folder's pictures in the order of its one CSV file, which has the columns `file` and `quantity`.

    Raises Refusal for a folder or a file that is not there, and for a quantity that is no number of 0 or more.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise Refusal(f"data {folder}: no such folder; give one of pictures with a CSV: file,quantity,unit")
    tables = sorted(folder.glob("*.csv"))
    if len(tables) != 1:
        raise Refusal(f"data {folder}: {len(tables)} CSV files; give a folder with one: file,quantity,unit")
    with tables[0].open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise Refusal(f"data {tables[0]}: no column {missing[0]}; its first line must be: file,quantity,unit")
        labels = [_labelled(folder, row, f"data {tables[0]}, line {reader.line_num}") for row in reader]
    if not labels:
        raise Refusal(f"data {tables[0]}: names no picture; add lines such as: 000.png,750,ml")
    return labels


def _labelled(folder: Path, row: dict[str, str], where: str) -> Labelled:
    try:
        quantity = float(row["quantity"])
    except (TypeError, ValueError):
        quantity = math.nan
    if not 0 <= quantity < math.inf:
        raise Refusal(f"{where}: quantity {row['quantity']!r}; must be a number of 0 or more, its unit apart from it")
    path = folder / (row["file"] or "")
    if not path.is_file():
        raise Refusal(f"{where}: no picture {path}; add it, or take its line out")
    return Labelled(path, quantity)


class Pictures:
    """Examples `first` to `last` - 1 of a folder, made into a model's inputs by the processor in `processor`.

    A `espalier.stages.data.training_batches.Source`; what shapes its batches is the processor's padding: at the right
    of what is trained on, at the left of what is to be continued.
    """

    def __init__(self, folder: str, processor: str, question: str, first: int = 0, last: int | None = None) -> None:
        self.labels = read_labels(Path(folder))[first:last]
        self._processor = load_processor(Path(processor))
        self._prompt = prompt(self._processor, question)
        self._cache: dict[int, dict[str, Tensor]] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def tokenizer(self) -> Any:
        return self._processor.tokenizer

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels (examples, longest) and what the model takes of the pictures.

        labels are IGNORED but for the answer and the end of the text.
        """
        parts, asked, answers = [], [], []
        for index in indices:
            inputs = self._inputs(index)
            answers.append(self.answer_ids(index))
            asked.append(inputs["input_ids"].shape[1])
            parts.append(_extended(inputs, answers[-1]))
        batch = self._joined(parts, left=False)
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for row, (start, answer) in enumerate(zip(asked, answers, strict=True)):
            labels[row, start : start + len(answer)] = answer
        return batch | {"labels": labels}

    def questions(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The same without answers, padded at the left, so that the model goes on behind each."""
        return self._joined([self._inputs(index) for index in indices], left=True)

    def answer_ids(self, index: int) -> Tensor:
        """The tokens of the answer and of the text's end."""
        ids = self.tokenizer(self.labels[index].answer, add_special_tokens=False)["input_ids"]
        return torch.tensor([*ids, self.tokenizer.eos_token_id])

    def _inputs(self, index: int) -> dict[str, Tensor]:
        """What the processor makes of one picture and the question."""
        if index in self._cache:
            return self._cache[index]
        image = open_image(self.labels[index].path)
        given = dict(self._processor(images=[image], text=[self._prompt], return_tensors="pt"))
        size = sum(tensor.nbytes for tensor in given.values())
        if self._cached_bytes + size <= CACHE_BYTES:
            self._cache[index] = given
            self._cached_bytes += size
        return given

    def _joined(self, parts: Sequence[dict[str, Tensor]], left: bool) -> dict[str, Tensor]:
        longest = max(part["input_ids"].shape[1] for part in parts)
        filler = {"input_ids": self.tokenizer.pad_token_id or 0}
        by_token = ("input_ids", "attention_mask", *BY_TOKEN)

        def padded(name: str, tensor: Tensor) -> Tensor:
            if name not in by_token:
                return tensor
            missing = longest - tensor.shape[1]
            return torch.nn.functional.pad(tensor, (missing, 0) if left else (0, missing), value=filler.get(name, 0))

        return {name: torch.cat([padded(name, part[name]) for part in parts]) for name in parts[0]}


def _extended(inputs: dict[str, Tensor], answer: Tensor) -> dict[str, Tensor]:
    """The inputs of one example with its answer behind the question."""
    behind = {"input_ids": answer[None], "attention_mask": torch.ones(1, len(answer), dtype=torch.long)}
    behind |= {name: torch.zeros(1, len(answer), dtype=torch.long) for name in BY_TOKEN}
    return {
        name: torch.cat([tensor, behind[name].to(tensor.dtype)], dim=1) if name in behind else tensor
        for name, tensor in inputs.items()
    }


def prompt(processor: Any, question: str) -> str:
    """The question behind a picture, as the processor's chat template has it; without one, the picture and then it."""
    if getattr(processor, "chat_template", None) is None:
        return f"{processor.image_token}{question}"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    message = [{"role": "user", "content": content}]
    return str(processor.apply_chat_template(message, add_generation_prompt=True))
