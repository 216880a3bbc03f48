"""Conversations as the tokenizer's chat template writes them: turns of role and content, or of from and value."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from espalier.stages.errors import Refusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPEAKERS = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant", "bard": "assistant"}
SPEAKERS |= {"model": "assistant", "function_call": "assistant", "function_response": "tool", "observation": "tool"}


def is_conversation(value: object) -> bool:
    """Whether it is a list of turns."""
    return isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) and _keys(turn) for turn in value)


def _keys(turn: Mapping[str, Any]) -> tuple[str, str] | None:
    return next(
        (keys for keys in (("role", "content"), ("from", "value")) if keys[0] in turn and keys[1] in turn), None
    )


class Conversations:
    """Conversations made into text, and the account of those that the template would not have."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase | None") -> None:
        self.template = tokenizer if getattr(tokenizer, "chat_template", None) else None
        self.rendered, self.refused, self.reason = 0, 0, ""

    @property
    def said(self) -> str:
        """How the turns become text, in a few words."""
        return "through the chat template" if self.template else "turns joined by line breaks (no chat template)"

    def text(self, turns: Sequence[Mapping[str, Any]], where: str) -> str | None:
        """The conversation as the template writes it, its contents line by line where there is none; None if the
        template refuses it. Raises Refusal for a turn whose content is no text."""
        messages = [_message(turn, where) for turn in turns]
        if self.template is None:
            self.rendered += 1
            return "\n".join(message["content"] for message in messages if message.get("content"))
        try:
            text = self.template.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # a template is a program: it raises what it likes
            self.refused += 1
            self.reason = self.reason or f"{where}: {' '.join(str(error).split()) or type(error).__name__}"
            return None
        self.rendered += 1
        return str(text)


def _message(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The turn in the words of templates. What Arrow fills up with None is left out."""
    keys = _keys(turn)
    assert keys is not None
    role, content = (turn[key] for key in keys)
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    if not isinstance(content, str | None):
        raise Refusal(f"{where}: a turn's {keys[1]} is {type(content).__name__}, not text")
    more = {name: value for name, value in turn.items() if name not in keys and value is not None}
    return more | {"role": SPEAKERS.get(str(role), str(role)), "content": content or ""}


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type", "no text") if isinstance(part, Mapping) else type(part).__name__
    raise Refusal(f"{where}: a turn holds a part of type {kind}, and text is calibrated on; give turns of text")
