"""How well a model reads numbers: it goes on greedily behind the question, and the first number that it says counts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from espalier.stages.data.labelled_images import Pictures

BATCH = 64
NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Reading:
    """Figures over all pictures."""

    error: float  # mean absolute error, in the pictures' own units
    exact: float  # share of numbers read as they are


def said_number(text: str) -> float:
    """The first number in `text`. What says none is taken as 0, which is as wrong as the quantity is large."""
    found = NUMBER.search(text)
    return float(found.group()) if found else 0.0


@torch.no_grad()
def read_numbers(model: Any, pictures: Pictures) -> list[float]:
    """What the model says of each picture, in their order; at most as many tokens as the longest true answer takes."""
    longest = max(len(pictures.answer_ids(index)) for index in range(len(pictures)))
    tokenizer, said = pictures.tokenizer, []
    options = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    # A model of which little is left may say the token that stands for an image, of which there is none.
    options |= {"suppress_tokens": [model.config.image_token_id], "use_cache": True, "do_sample": False}
    for start in range(0, len(pictures), BATCH):
        asked = pictures.questions(range(start, min(start + BATCH, len(pictures))))
        inputs = {name: tensor.to(model.device) for name, tensor in asked.items()}
        ids = model.generate(**inputs, max_new_tokens=longest, num_beams=1, **options)
        answers = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        said += [said_number(answer) for answer in answers]
    return said


def rate_reading(said: Sequence[float], true: Sequence[float]) -> Reading:
    """The error of what was said against what is true."""
    errors = [abs(one - other) for one, other in zip(said, true, strict=True)]
    return Reading(sum(errors) / len(errors), sum(error == 0 for error in errors) / len(errors))


def constant_guess(learned: Sequence[float], true: Sequence[float]) -> Reading:
    """What always saying the median of the quantities trained on, the best constant, comes to on others."""
    return rate_reading([median(learned)] * len(true), true)
