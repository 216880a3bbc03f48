"""A pruned model goes on with a text: it is a plain checkpoint, with exact zeros.

python pipeline/examples/continue_text.py MODEL "Once upon a time"
"""

import sys
from typing import Any

import torch

from espalier import load


def main(model: str, text: str, tokens: int = 40) -> str:
    """`text` and what the model makes of it."""
    pruned, tokenizer = load(model)
    given = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        answer: Any = pruned.generate(input_ids=given["input_ids"], max_new_tokens=tokens, do_sample=False)  # type: ignore[operator]
    return str(tokenizer.decode(answer[0], skip_special_tokens=True))


if __name__ == "__main__":
    sys.stdout.write(f"{main(sys.argv[1], sys.argv[2])}\n")
