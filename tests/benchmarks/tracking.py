"""What a shadow's options are worth: the mask that each gives, from one and the same training run.

python tests/benchmarks/tracking.py --data ../shared/data/tinyshakespeare.txt --seeds 0 1

A plain loop in one process, without Ray and DeepSpeed: all shadows ride on one training of the recipe's model, so that
nothing differs but the score. `espalier track shakespeare-small --data FILE` with the flags in the table is the same
experiment, one option at a time.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from espalier.pipeline.config.track import TrackConfig, load_config
from espalier.pipeline.weight_tracking.data import prepare
from espalier.stages.data.training_batches import Order, Source, open_source
from espalier.stages.loading.skeleton import read_config
from espalier.stages.masks import thresholds_for_sparsity
from espalier.stages.shadow.tracker import ShadowTracker
from espalier.stages.training.lr_schedule import rate_at

VARIANTS = {
    "linear (the paper's)": {},
    "`--score final`": {"window": 1},
    "`--shadow-schedule uniform`": {"schedule": "uniform"},
    "`--shadow-schedule exponential`": {"schedule": "exponential"},
    "`--shadow-schedule exponential --shadow-decay 0.8`": {"schedule": "exponential", "decay": 0.8},
    "`--no-shadow-signed`": {"signed": False},
    "`--shadow-window 5`": {"window": 5},
    "`--shadow-window 25`": {"window": 25},
    "`--shadow-dtype bf16`": {"dtype": "bf16"},
    "`--shadow-dtype int8`": {"dtype": "int8"},
}


def prunable(model: PreTrainedModel) -> dict[str, Tensor]:
    """The matrices of the blocks."""
    return {name: weight for name, weight in model.named_parameters() if ".h." in name and weight.dim() == 2}


def train(
    model: PreTrainedModel, source: Source, config: TrackConfig, steps: int, peak: float, keep: dict[str, Tensor]
) -> Iterator[int]:
    """Train in place, the weights outside `keep` held at zero; yields after each step the number of steps done."""
    weights = dict(model.named_parameters())
    decayed = [weight for weight in weights.values() if weight.dim() > 1]
    others = [weight for weight in weights.values() if weight.dim() < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, config.beta2))
    order, warmup = Order(len(source), config.batch, config.seed), min(config.warmup, steps // 10)
    model.train()
    for step in range(steps):
        rate = rate_at(step, peak=peak, schedule=config.schedule, warmup=warmup, steps=steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        model(**source.batch(order.step(step)), use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, mask in keep.items():
                weights[name].mul_(mask)
        yield step + 1


@torch.no_grad()
def loss_of(model: PreTrainedModel, source: Source, size: int = 128) -> float:
    """Mean over the windows, which are all of one length."""
    model.eval()
    starts = range(0, len(source), size)
    parts = [range(start, min(start + size, len(source))) for start in starts]
    losses = [float(model(**source.batch(part), use_cache=False).loss) * len(part) for part in parts]
    return sum(losses) / len(source)


def masks(importance: dict[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """What the sigma threshold that removes this share keeps."""
    (rate,) = thresholds_for_sparsity(importance.values(), [sparsity])
    return {name: (scores > rate * scores.std(correction=0)).float() for name, scores in importance.items()}


def run(config: TrackConfig, scratch: Path, sparsities: list[float], steps: int) -> Iterator[dict]:
    """A row for each variant and sparsity."""
    material = prepare(config, scratch)
    assert material.sources.eval is not None
    learned, held_out = open_source(material.sources.data), open_source(material.sources.eval)
    torch.manual_seed(config.seed)
    model = AutoModelForCausalLM.from_config(read_config(Path(material.model)))
    trackers = {name: ShadowTracker(prunable(model).items(), **options) for name, options in VARIANTS.items()}
    for step in train(model, learned, config, config.steps, config.learning_rate, {}):
        if step % config.shadow_every == 0:
            for tracker in trackers.values():
                tracker.update()
    yield {"variant": "dense", "seed": config.seed, "loss": loss_of(model, held_out)}
    reference: dict[float, dict[str, Tensor]] = {}
    for sparsity in sparsities:
        for variant, tracker in trackers.items():
            keep = masks(tracker.importance(), sparsity)
            pruned = deepcopy(model)
            with torch.no_grad():
                for name, weight in prunable(pruned).items():
                    weight.mul_(keep[name])
            before = loss_of(pruned, held_out)
            for _ in train(pruned, learned, config, steps, config.finetune_learning_rate, keep):
                pass
            first = reference.setdefault(sparsity, keep)
            yield {
                "variant": variant, "seed": config.seed, "sparsity": sparsity, "pruned": before,
                "tuned": loss_of(pruned, held_out), "bytes": tracker.nbytes, "same": overlap(first, keep),
            }  # fmt: skip


def overlap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Of the weights that `one` keeps, the share that `other` keeps."""
    both = sum(float((one[name] * other[name]).sum()) for name in one)
    return both / sum(float(mask.sum()) for mask in one.values())


def table(rows: list[dict], sparsities: list[float]) -> str:
    """Mean over the seeds, and half their range: loss after pruning -> after fine-tuning; of the mask's weights those
    that the first variant keeps too; bytes of the shadow."""
    dense = [row["loss"] for row in rows if row["variant"] == "dense"]
    lines = [f"dense: {mean(dense)}", "", "| score | " + " | ".join(f"{s:.0%} | same" for s in sparsities) + " | MB |"]
    lines.append("|---|" + "---:|" * (2 * len(sparsities) + 1))
    for variant in VARIANTS:
        cells = []
        for sparsity in sparsities:
            these = [row for row in rows if row["variant"] == variant and row.get("sparsity") == sparsity]
            if these:
                cells += [f"{mean([r['pruned'] for r in these])} -> {mean([r['tuned'] for r in these])}"]
                cells += [f"{np.mean([row['same'] for row in these]):.1%}"]
                size = these[0]["bytes"] / 1e6
        if cells:
            lines.append(f"| {variant} | " + " | ".join(cells) + f" | {size:.2f} |")
    return "\n".join(lines)


def mean(values: list[float]) -> str:
    spread = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--recipe", default="shakespeare-small")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="of training; default: the recipe's")
    parser.add_argument("--finetune-steps", type=int, default=100)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.6, 0.8, 0.94])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=Path, default=Path("tracking.jsonl"), help="appended to as rows come")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    started, rows = time.perf_counter(), []
    for seed in options.seeds:
        flags = {"data": options.data, "output": "unused", "seed": seed}
        flags |= {"steps": options.steps} if options.steps else {}
        config = load_config(options.recipe, flags)
        with tempfile.TemporaryDirectory() as scratch, options.rows.open("a") as file:
            for row in run(config, Path(scratch), options.sparsities, options.finetune_steps):
                rows.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()
                assert math.isfinite(row.get("tuned", row.get("loss")))
    print(table(rows, options.sparsities))
    print(json.dumps({"seconds": round(time.perf_counter() - started), "steps": config.steps}))


if __name__ == "__main__":
    main()
