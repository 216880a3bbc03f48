"""Pictures with a quantity: what a model is given of them, and how its reading is rated."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from image_models import seeing_checkpoint
from PIL import Image

from espalier.stages.data.labelled_images import Pictures, read_labels
from espalier.stages.data.training_batches import IGNORED
from espalier.stages.errors import Refusal
from espalier.stages.metrics.number_reading import Reading, constant_guess, rate_reading, read_numbers, said_number
from espalier.stages.training.model import load_model

QUANTITIES = ("5", "750", "1.5", "24")
PADDING = 0


def picture_folder(folder: Path, side: int = 16) -> Path:
    folder.mkdir()
    lines = ["file,quantity,unit"]
    for number, quantity in enumerate(QUANTITIES):
        Image.new("RGB", (side, side), (60 * number, 0, 255)).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{quantity},ml")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module", params=["llava", "qwen2_vl", "gemma3"])
def seeing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeing_checkpoint(tmp_path_factory.mktemp("models") / request.param, request.param, torch.float32)


def test_only_the_answer_and_the_end_of_the_text_are_learned(seeing: Path, folder: Path) -> None:
    pictures = Pictures(str(folder), str(seeing), "How much?")
    batch = pictures.batch([1, 0, 2])
    for row, answer in enumerate(("750", "5", "1.5")):
        learned = batch["labels"][row][batch["labels"][row] != IGNORED]
        assert "".join(map(chr, learned.tolist())) == answer + "\x02"
        at = (batch["labels"][row] != IGNORED).nonzero().flatten()
        assert torch.equal(batch["input_ids"][row][at], learned)
        assert batch["attention_mask"][row].sum() == at[-1] + 1  # what is behind the end is padding


def test_every_family_gives_a_loss_that_another_examples_padding_does_not_change(seeing: Path, folder: Path) -> None:
    model = load_model(seeing, torch.float32, 0).eval()
    pictures = Pictures(str(folder), str(seeing), "?")
    with torch.no_grad():
        alone = [model(**pictures.batch([index]), use_cache=False).loss for index in (0, 1)]
        both = model(**pictures.batch([0, 1]), use_cache=False).loss
    assert both.item() == pytest.approx((2 * alone[0].item() + 4 * alone[1].item()) / 6, rel=1e-4)


def test_what_a_model_goes_on_with_does_not_depend_on_its_batch(seeing: Path, folder: Path) -> None:
    model = load_model(seeing, torch.float32, 0).eval()
    said = read_numbers(model, Pictures(str(folder), str(seeing), "?"))
    assert said == [read_numbers(model, Pictures(str(folder), str(seeing), "?", n, n + 1))[0] for n in range(4)]


def test_first_and_last_part_a_folder(folder: Path, seeing: Path) -> None:
    parts = [Pictures(str(folder), str(seeing), "?", *part) for part in ((0, 3), (3, None))]
    assert [[label.answer for label in part.labels] for part in parts] == [["5", "750", "1.5"], ["24"]]
    assert len(parts[0]) == 3


class Stub:
    """A model that always says the same."""

    device = torch.device("cpu")
    config = SimpleNamespace(image_token_id=3)

    def __init__(self, answer: str) -> None:
        self._answer = torch.tensor([[ord(character) for character in answer]])

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int, **_: Any) -> torch.Tensor:
        said = self._answer[:, :max_new_tokens].expand(len(input_ids), -1)
        return torch.cat([input_ids, said], dim=1)


class Asked(list[SimpleNamespace]):
    """Pictures without pictures: quantities, and a tokenizer of characters."""

    tokenizer = SimpleNamespace(
        pad_token_id=PADDING,
        eos_token_id=2,
        batch_decode=lambda ids, skip_special_tokens: ["".join(map(chr, row)) for row in ids.tolist()],
    )

    def questions(self, indices: range) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.zeros(len(indices), 2, dtype=torch.long)}

    def answer_ids(self, index: int) -> list[int]:
        return [0] * (1 + len(str(self[index])))


def test_the_error_is_that_of_the_first_number_said() -> None:
    pictures = Asked([5, 750, 24])
    assert read_numbers(Stub("24ml"), pictures) == [24.0] * 3  # type: ignore[arg-type]
    assert read_numbers(Stub("999999"), pictures) == [9999.0] * 3  # type: ignore[arg-type]
    assert rate_reading([24.0] * 3, pictures) == Reading(error=pytest.approx((19 + 726) / 3), exact=1 / 3)
    assert [said_number(text) for text in ("750 ml", "about 1.5 l", "none", "")] == [750.0, 1.5, 0.0, 0.0]


def test_the_constant_guess_is_the_median_of_what_was_trained_on() -> None:
    assert constant_guess([1, 10, 100], [10, 30]) == Reading(error=10.0, exact=0.5)


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (None, "0 CSV files"),
        ("file,amount\n0.png,5", "no column quantity"),
        ("file,quantity\n0.png,five", "line 2: quantity 'five'"),
        ("file,quantity\n0.png,-1", "quantity '-1'"),
        ("file,quantity\n9.png,5", "no picture"),
        ("file,quantity", "names no picture"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path: Path, lines: str | None, complaint: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    if lines is not None:
        (tmp_path / "labels.csv").write_text(lines + "\n")
    with pytest.raises(Refusal, match=complaint):
        read_labels(tmp_path)
    with pytest.raises(Refusal, match="no such folder"):
        read_labels(tmp_path / "nowhere")
