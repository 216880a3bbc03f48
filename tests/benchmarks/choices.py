"""A multiple-choice score from any text: which of four identifiers, or lines, comes next.

    python tests/benchmarks/choices.py [--model DIR] [--kind identifier line] [--questions 400] [--seed 0]

The right choice is what the text has; the three wrong ones are drawn from the same text as often as they stand there,
so that how common one is gives nothing away. A model chooses what is likeliest a token of it. By chance: 0.25.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import trained_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from espalier import load

Kind = Literal["identifier", "line"]
PIECES: dict[Kind, str] = {"identifier": r"\s?[^\W\d]\w{3,}", "line": r"\n[^\n]{8,80}(?=\n)"}
CHOICES, CONTEXT = 4, 64  # choices a question; tokens before them
AT_ONCE = 20  # questions


@dataclass(frozen=True, slots=True)
class Question:
    """The right choice comes first; none is empty."""

    context: tuple[int, ...]  # token ids, as many in every question
    choices: tuple[tuple[int, ...], ...]


def questions_for(
    tokenizer: PreTrainedTokenizerBase, text: str, kind: Kind, count: int = 400, seed: int = 0
) -> list[Question]:
    """Up to `count` questions from `text`, evenly spread over what it can be asked.

    Left out are places where a choice's tokens begin before the choice, and those with too little before them.
    """
    drawn = random.Random(seed)
    found = list(re.finditer(PIECES[kind], text))
    if len({match.group().strip() for match in found}) < CHOICES:
        return []
    questions: list[Question] = []
    for match in drawn.sample(found, len(found)):
        wrong: list[str] = []
        while len(wrong) < CHOICES - 1:
            other = drawn.choice(found).group()
            other = match.group()[: len(match.group()) - len(match.group().lstrip())] + other.lstrip()
            if other not in (match.group(), *wrong):
                wrong.append(other)
        before = text[max(0, match.start() - 12 * CONTEXT) : match.start()]
        if question := _question(tokenizer, before, [match.group(), *wrong]):
            questions.append(question)
        if len(questions) == count:
            break
    return questions


def _question(tokenizer: PreTrainedTokenizerBase, before: str, choices: list[str]) -> Question | None:
    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    context = ids(before)
    whole = [ids(before + choice) for choice in choices]
    if len(context) < CONTEXT or any(one[: len(context)] != context or len(one) == len(context) for one in whole):
        return None
    return Question(context[-CONTEXT:], tuple(one[len(context) :] for one in whole))


@torch.no_grad()
def likelihoods(model: PreTrainedModel, questions: list[Question]) -> Tensor:
    """(questions, choices) float32: mean over a choice's tokens of log p(token | context and the tokens before it)."""
    context = torch.tensor([question.context for question in questions])
    seen = model(context, use_cache=True)
    flat = [choice for question in questions for choice in question.choices]
    longest = max(map(len, flat))
    tokens = torch.tensor([[*choice, *[0] * (longest - len(choice))] for choice in flat])
    there = torch.tensor([[True] * len(choice) + [False] * (longest - len(choice)) for choice in flat])
    copies = len(flat) // len(questions)
    first = seen.logits[:, -1:].repeat_interleave(copies, 0)
    seen.past_key_values.batch_repeat_interleave(copies)
    rest = model(tokens[:, :-1], past_key_values=seen.past_key_values).logits if longest > 1 else first[:, :0]
    log_p = torch.cat([first, rest], 1).float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return ((log_p * there).sum(1) / there.sum(1)).view(len(questions), copies)


def accuracy(model: PreTrainedModel, questions: list[Question]) -> float:
    """Share of the questions whose right choice is likelier a token than every other."""
    parts = [questions[start : start + AT_ONCE] for start in range(0, len(questions), AT_ONCE)]
    right = 0
    for part in parts:
        scores = likelihoods(model, part)
        right += int((scores[:, :1] > scores[:, 1:]).all(1).sum())
    return right / len(questions)


def main() -> None:
    parser = trained_model.parser(__doc__, "espalier-choices")
    parser.add_argument("--kind", nargs="+", default=list(get_args(Kind)), choices=get_args(Kind))
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    settings: Any = trained_model.parsed(parser)
    model, tokenizer = load(settings.model)
    text = (settings.eval or trained_model.texts_for(settings)[1]).read_text()
    for kind in settings.kind:
        questions = questions_for(tokenizer, text, kind, settings.questions, settings.seed)
        if not questions:
            print(f"{Path(settings.model).name}, next {kind}: the text has nothing to ask")
            continue
        print(f"{Path(settings.model).name}, next {kind}: {accuracy(model, questions):.4f} of {len(questions)}")


if __name__ == "__main__":
    main()
