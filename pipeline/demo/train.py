"""The demo model, trained from nothing: `python -m espalier.pipeline.demo.train OUT --minutes 40`.

A byte-level BPE tokenizer and a small Llama learn the standard library's own sources on the CPU, and are written as a
plain Hugging Face checkpoint. Seeds are fixed, but the schedule follows the clock: a faster machine sees more text.
Needs torch 2.9 or newer (its Muon optimizer) and a C++ compiler (torch.compile), which running the demo does not.
"""

import argparse
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from espalier.pipeline.demo import sources

log = logging.getLogger("espalier.pipeline.demo.train")

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 4096
TOKENS_PER_STEP = 2048
# Mostly as long as the windows the demo evaluates, with enough longer ones that all positions are learned.
WINDOW_LENGTHS = (256, 256, 256, 512)
LONGEST = max(WINDOW_LENGTHS)
EVALUATION_LENGTH = 256
MATRIX_RATE, OTHER_RATE = 6e-3, 4e-3  # Muon's and AdamW's peak learning rates
WARMUP_STEPS = 50
DECAY_SHARE = 0.6  # of the time, at its end: linearly to nothing


def model_config() -> LlamaConfig:
    """A Llama of 4.3 M parameters: 8.5 MB in bf16."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=224,
        intermediate_size=608,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learned from `texts`; it can encode any string, and its token 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All texts as one row of token ids (int64), each text followed by the end-of-text token."""
    encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return torch.tensor([token for text in encoded for token in (*text.ids, tokenizer.eos_token_id)])


def batches(tokens: Tensor, seed: int) -> Iterator[Tensor]:
    """Endless batches (windows, length + 1) of TOKENS_PER_STEP predictions each.

    Every pass over the text is cut at new places and shuffled, and every batch's windows are of one length.
    """
    generator = torch.Generator().manual_seed(seed)
    pieces_per_step = TOKENS_PER_STEP // LONGEST
    while True:
        offset = int(torch.randint(LONGEST, (1,), generator=generator))
        pieces = torch.arange(offset, len(tokens) - LONGEST, LONGEST)
        pieces = pieces[torch.randperm(len(pieces), generator=generator)]
        for step in range(len(pieces) // pieces_per_step):
            chosen = pieces[step * pieces_per_step : (step + 1) * pieces_per_step]
            length = WINDOW_LENGTHS[step % len(WINDOW_LENGTHS)]
            starts = (chosen[:, None] + torch.arange(0, LONGEST, length)).flatten()
            yield tokens[starts[:, None] + torch.arange(length + 1)]


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the embedding and the norms."""
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_at(step: int, share: float) -> float:
    """The learning rate at this step and share of the time, as a fraction of its peak: up, flat, down."""
    return min((step + 1) / WARMUP_STEPS, 1.0, (1 - share) / DECAY_SHARE)


def train(model: LlamaForCausalLM, tokens: Tensor, seconds: float, seed: int = 0) -> None:
    """Trains `model` in place for that long: fp32 weights, bf16 matrix products."""

    # Fusing the elementwise work saves a quarter of a step; each window length compiles once, in about half a minute.
    @torch.compile(dynamic=False)
    def loss_of(windows: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=windows[:, :-1], use_cache=False).logits
        return cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())

    steppers = optimizers(model)
    peaks = [stepper.param_groups[0]["lr"] for stepper in steppers]
    started, seen, smoothed = time.monotonic(), 0, math.log(VOCABULARY)
    model.train()
    for step, windows in enumerate(batches(tokens, seed)):
        elapsed = time.monotonic() - started
        if elapsed >= seconds:
            break
        for stepper, peak in zip(steppers, peaks, strict=True):
            stepper.param_groups[0]["lr"] = peak * rate_at(step, elapsed / seconds)
        loss = loss_of(windows)
        loss.backward()
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
        seen += windows[:, 1:].numel()
        smoothed += (loss.item() - smoothed) * max(0.02, 1 / (step + 1))
        if step % 50 == 0:
            log.info(
                "%3.0f%%  step %5d  loss %.3f  %5.2f M tokens  %5.0f tokens/s  %4.1f min left",
                100 * elapsed / seconds, step, smoothed, seen / 1e6, seen / (elapsed + 1e-9), (seconds - elapsed) / 60,
            )  # fmt: skip


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, tokens: Tensor, length: int = EVALUATION_LENGTH) -> float:
    """exp of the mean loss over whole windows of `length` tokens: every token counts but each window's first."""
    model.eval()
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    total = 0.0
    for batch in windows.split(16):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        total += cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (len(windows) * (length - 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory for the checkpoint")
    parser.add_argument("--minutes", type=float, default=40, help="how long to train (default: 40)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads to use (default: 1)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    texts = sources.files("training")
    tokenizer = train_tokenizer(texts)
    tokens = encode(tokenizer, texts)
    model = LlamaForCausalLM(model_config())
    log.info("%d files, %.2f M tokens; %.2f M parameters", len(texts), len(tokens) / 1e6, model.num_parameters() / 1e6)
    train(model, tokens, options.minutes * 60)

    model.bfloat16()
    held_out = encode(tokenizer, [sources.held_out_text()])[:-1]
    measured = perplexity(model, held_out)
    log.info("held-out perplexity %.2f: %d tokens, windows of %d", measured, len(held_out), EVALUATION_LENGTH)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    log.info("written to %s", options.out)


if __name__ == "__main__":
    main()
