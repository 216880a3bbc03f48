"""What a shadow of the weights costs: bytes a rank, seconds an update, and what it adds to training.

    python tests/benchmarks/shadow.py --ranks 1 2          # the 111 M Llama, every format, one process a rank
    python tests/benchmarks/shadow.py --train              # beside training: a snapshot every --every steps
    python tests/benchmarks/shadow.py --every 1 --train    # at the worst

Seconds are the least of --repeats; the loop's ratio is that of the medians of steps with and without, taken in turn.
"""

import argparse
import statistics
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from espalier.stages.shadow.tracker import ShadowTracker

FORMATS = {
    "fp32": {"dtype": "fp32"},
    "bf16": {"dtype": "bf16"},
    "bf16 + rest": {"dtype": "bf16", "rounding": "compensated"},
    "int8": {"dtype": "int8"},
}


def llama(blocks: int) -> LlamaForCausalLM:
    """The random Llama that the other benchmarks run on; 111 M parameters with 8 blocks."""
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def partition(named: list[tuple[str, Tensor]], rank: int, ranks: int) -> Iterator[tuple[str, Tensor]]:
    """A rank's slices, as ZeRO stages 1 and 2 cut them: equal stretches of all parameters laid end to end."""
    total = sum(parameter.numel() for _, parameter in named)
    low, high, start = total * rank // ranks, total * (rank + 1) // ranks, 0
    for name, parameter in named:
        first, last = max(low - start, 0), min(high - start, parameter.numel())
        if first < last:
            yield f"{name}@{first}", parameter.detach().view(-1)[first:last]
        start += parameter.numel()


def costs(model: LlamaForCausalLM, ranks: list[int], repeats: int) -> None:
    named = list(model.named_parameters())
    total = sum(parameter.numel() for _, parameter in named)
    print(f"{total / 1e6:.1f} M parameters, {torch.get_num_threads()} threads")
    print("format        ranks   MB a rank  bytes a weight  s an update")
    for label, options in FORMATS.items():
        for count in ranks:
            pieces = list(partition(named, 0, count))
            tracker = ShadowTracker(pieces, **options)
            share = sum(piece.numel() for _, piece in pieces)
            seconds = []
            for _ in range(repeats + 1):  # the first touches the memory for the first time
                started = time.perf_counter()
                tracker.update()
                seconds.append(time.perf_counter() - started)
            print(
                f"{label:12} {count:6} {tracker.nbytes / 1e6:11.1f} {tracker.nbytes / share:15.3f} "
                f"{min(seconds[1:]):12.3f}"
            )


def beside_training(model: LlamaForCausalLM, every: int, steps: int, tokens: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batch = torch.randint(0, 8192, (1, tokens), generator=torch.Generator().manual_seed(0))

    def step(tracker: ShadowTracker | None) -> float:
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if tracker is not None:
            tracker.update()
        return time.perf_counter() - started

    print(f"steps of {tokens} tokens, a snapshot every {every}\nformat        s a step    s tracked    ratio")
    for label, options in FORMATS.items():
        tracker = ShadowTracker(model.named_parameters(), **options)
        step(tracker)
        plain, tracked = [], []
        for _ in range(steps):
            plain.append(step(None))
            tracked.append(step(tracker))
        without, added = statistics.median(plain), statistics.median(tracked) - statistics.median(plain)
        print(f"{label:12} {without:9.3f} {without + added:12.3f} {1 + added / every / without:8.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.train:
        beside_training(llama(args.blocks), args.every, args.steps, args.tokens)
    else:
        costs(llama(args.blocks), args.ranks, args.repeats)
