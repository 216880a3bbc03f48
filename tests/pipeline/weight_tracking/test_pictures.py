"""Rendered product labels, the small model that is to read them, and what `espalier track pictures` is given."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from espalier.pipeline.config.track import TrackConfig, load_config
from espalier.pipeline.weight_tracking.data import prepare
from espalier.pipeline.weight_tracking.pictures.data import METRIC
from espalier.pipeline.weight_tracking.pictures.model import write_model
from espalier.pipeline.weight_tracking.pictures.render import QUANTITIES, TABLE, label, picture, render
from espalier.stages.data.labelled_images import read_labels
from espalier.stages.data.training_batches import open_source
from espalier.stages.errors import Refusal
from espalier.stages.training.model import load_model


def asked(tmp_path: Path, **flags: Any) -> TrackConfig:
    """The recipe with few pictures."""
    return load_config("pictures", {"output": str(tmp_path / "out"), "data_options": ["pictures=20"]} | flags)


def test_a_picture_is_a_function_of_seed_and_index() -> None:
    assert np.array_equal(picture(3, 7, 32), picture(3, 7, 32))
    assert not np.array_equal(picture(3, 7, 32), picture(4, 7, 32))
    assert picture(3, 7, 48).size == (48, 48)
    said = [label(0, index) for index in range(400)]
    assert {one.quantity for one in said} == set(QUANTITIES)
    assert len({one.brand for one in said}) > 200


def test_what_is_drawn_is_what_the_label_says() -> None:
    """Pictures of one quantity look alike: the nearest mean picture of others names it more often than chance does."""
    some = [index for index in range(300) if label(0, index).quantity in (5, 750)]

    def middle(index: int) -> np.ndarray:
        grey = np.asarray(picture(0, index, 32).convert("L"), np.float32)[10:25]
        return (grey - grey.mean()) / grey.std()

    drawn = {index: middle(index) for index in some}
    right = 0
    for index in some:
        others = {
            quantity: np.mean([drawn[i] for i in some if i != index and label(0, i).quantity == quantity], axis=0)
            for quantity in (5, 750)
        }
        near = min(others, key=lambda quantity: float(np.square(drawn[index] - others[quantity]).sum()))
        right += near == label(0, index).quantity
    assert right > 0.8 * len(some)


def test_a_rendered_folder_says_in_its_table_what_it_shows_and_is_rendered_once(tmp_path: Path) -> None:
    folder = render(tmp_path / "pictures", 5, 32, seed=1)
    with (folder / TABLE).open() as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["quantity"]), row["unit"]) for row in rows] == [
        (label(1, index).quantity, label(1, index).unit) for index in range(5)
    ]
    assert [one.quantity for one in read_labels(folder)] == [float(row["quantity"]) for row in rows]
    (folder / rows[0]["file"]).unlink()
    render(folder, 5, 32, seed=1)
    assert not (folder / rows[0]["file"]).exists()  # finished folders are left as they are


def test_the_recipes_model_reads_and_learns_its_pictures(tmp_path: Path) -> None:
    config = asked(tmp_path)
    material = prepare(config, tmp_path)
    data, held_out = open_source(material.sources.data), open_source(material.sources.eval)
    assert (len(data), len(held_out), material.epoch) == (18, 2, 18)
    assert len(material.calibration[0]) == config.length
    assert [share for share, _ in material.beside["always the median"]] == config.sparsities
    model = load_model(Path(material.model), torch.float32, seed=0)
    assert 0.9e6 < model.num_parameters() < 3e6
    batch = data.batch(range(18))
    assert batch["input_ids"].shape[1] <= config.length
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.grad is None for parameter in model.parameters())
    model.save_pretrained(tmp_path / "trained")
    read = material.measure(tmp_path / "trained")
    assert read[METRIC] >= 0 and 0 <= read["read exactly"] <= 1

    # What is left after pruning may take the token that stands for an image for the likeliest: no image is there.
    with torch.no_grad():
        hidden = model.model(**{name: batch[name] for name in ("input_ids", "pixel_values")}).last_hidden_state
        model.lm_head.weight[model.config.image_token_id] = 100 * hidden.mean((0, 1))
        said = model(**batch, use_cache=False).logits.argmax(-1)
    assert (said[:, -8:] == model.config.image_token_id).all()
    model.save_pretrained(tmp_path / "damaged")
    assert material.measure(tmp_path / "damaged")[METRIC] >= 0


def test_a_folder_of_ones_own_is_read_instead(tmp_path: Path) -> None:
    folder = render(tmp_path / "mine", 10, 24, seed=5)
    material = prepare(asked(tmp_path, data=str(folder), held_out="0.3"), tmp_path)
    assert (len(open_source(material.sources.data)), len(open_source(material.sources.eval))) == (7, 3)
    assert not (tmp_path / "pictures").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"data_options": ["picture=20"]}, "data-option 'picture' is unknown; did you mean pictures"),
        ({"data_options": ["pictures=many"]}, "data-option pictures many: must be a whole number"),
        ({"data_options": ["pictures=2"], "held_out": "0.1"}, "2 pictures, too few to hold 10% of them out"),
        ({"data": "nowhere"}, "nowhere: no such folder"),
    ],
)
def test_pictures_that_will_not_do_are_refused(tmp_path: Path, flags: dict[str, Any], said: str) -> None:
    with pytest.raises(Refusal, match=said):
        prepare(asked(tmp_path, **flags), tmp_path)


def test_a_model_that_sees_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="model_type 'llama' reads no pictures"):
        write_model({"model_type": "llama"}, tmp_path)
