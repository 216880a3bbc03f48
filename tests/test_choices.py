"""The benchmarks' multiple-choice score, beside the obvious way: each choice alone, one token after the other."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from choices import CHOICES, CONTEXT, Kind, Question, accuracy, likelihoods, questions_for
from family_models import random_model
from trained import BUNDLED
from transformers import AutoTokenizer

LENGTHS = (1, 3, 2, 5)  # tokens of each choice


def random_questions(count: int) -> list[Question]:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, 100, (length,), generator=generator).tolist())

    return [Question(ids(12), tuple(ids(length) for length in LENGTHS)) for _ in range(count)]


def by_hand(model: torch.nn.Module, question: Question, choice: tuple[int, ...]) -> float:
    """Mean over the choice's tokens of the log-probability that the whole text before it gives each."""
    text, total = list(question.context), 0.0
    for token in choice:
        total += float(model(torch.tensor([text])).logits[0, -1].log_softmax(-1)[token])
        text.append(token)
    return total / len(choice)


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # gemma2: sliding windows, soft caps
@torch.no_grad()
def test_likelihoods_are_those_of_each_choice_alone(family: str) -> None:
    model, questions = random_model(family, torch.float32).eval(), random_questions(5)
    expected = torch.tensor(
        [[by_hand(model, question, choice) for choice in question.choices] for question in questions]
    )
    assert torch.allclose(likelihoods(model, questions), expected, atol=1e-4)
    right = [row[0] > max(row[1:]) for row in expected.tolist()]
    assert accuracy(model, questions) == sum(right) / len(right)


def test_a_choice_of_one_token_needs_no_second_pass() -> None:
    model = random_model("llama", torch.float32).eval()
    question = Question((5, 6, 7), ((8,), (9,)))
    with torch.no_grad():
        expected = [by_hand(model, question, choice) for choice in question.choices]
    assert likelihoods(model, [question])[0].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["identifier", "line"])
def test_the_right_choice_stands_in_the_text_and_the_wrong_ones_elsewhere(kind: Kind) -> None:
    tokenizer, text = AutoTokenizer.from_pretrained(BUNDLED), inspect.getsource(json) + inspect.getsource(Path)
    questions = questions_for(tokenizer, text, kind, count=30)
    assert len(questions) == 30
    for question in questions:
        before, choices = tokenizer.decode(question.context), [tokenizer.decode(ids) for ids in question.choices]
        assert len(question.context) == CONTEXT
        assert before + choices[0] in text
        assert len(set(choices)) == CHOICES
        assert all(choice.strip() in text for choice in choices)
    assert questions == questions_for(tokenizer, text, kind, count=30)
    assert questions != questions_for(tokenizer, text, kind, count=30, seed=1)


def test_a_text_of_too_few_pieces_asks_nothing() -> None:
    assert questions_for(AutoTokenizer.from_pretrained(BUNDLED), "three words only " * 99, "identifier") == []
