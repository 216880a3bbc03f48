"""`espalier eval`: perplexity of a checkpoint, run shard by shard, so that no process holds it whole."""

import math
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.connect import connect
from cluster.fleet import Fleet
from pipeline.config import EvalConfig
from pipeline.driver import load_tokenizer, stream_of
from pipeline.layout import Layout, Load, arrange
from pipeline.plan import ModelFacts, check_headers, microbatch_size, model_facts
from pipeline.progress import Reporter, reporter_for
from stages.checkpoint import Checkpoint, resolve
from stages.errors import Refusal
from stages.skeleton import read_config
from stages.tokens import TokenTable, build_token_table


def evaluate(config: EvalConfig, reporter: Reporter | None = None) -> dict[str, Any]:
    """Perplexity and sparsity of `config.model`, and of `config.against` on the same windows.

    Keys: model, perplexity, tokens, windows, length, sparsity; with `against` also against_perplexity and
    log_perplexity_gap (nats a token). Raises Refusal for what cannot work, before Ray starts.
    """
    reporter = reporter or reporter_for(Console(stderr=True))
    models = [config.model, *([config.against] if config.against else [])]
    layouts = [_layout(config, model) for model in models]
    length = min(layout.length for layout in layouts)
    if len({layout.facts.vocabulary for layout in layouts}) > 1:
        sizes = " and ".join(str(layout.facts.vocabulary) for layout in layouts)
        raise Refusal(f"against {config.against}: vocabularies of {sizes} tokens; compare models of one tokenizer")
    with tempfile.TemporaryDirectory(prefix="espalier-eval-", dir=config.scratch) as scratch, ExitStack() as held:
        held.callback(reporter.close)
        table = build_token_table(
            config.data,
            load_tokenizer(config.model, config.trust_remote_code),
            length=length,
            samples=None,
            seed=0,
            path=Path(scratch) / "tokens.arrow",
            vocab_size=layouts[0].facts.vocabulary,
            purpose="evaluation",
        )
        held.enter_context(
            connect(
                config.address,
                cpus=max(layout.local_cpus for layout in layouts),
                gpus=max(layout.local_gpus for layout in layouts),
                object_store_bytes=max(layout.object_store_bytes for layout in layouts),
            )
        )
        values = [_perplexity(config, layout, table, scratch, reporter) for layout in layouts]
    result: dict[str, Any] = {
        "model": config.model,
        "perplexity": values[0][0],
        "tokens": values[0][1],
        "windows": len(table),
        "length": length,
        "sparsity": sparsity_of(resolve(config.model), layouts[0].facts),
    }
    if config.against:
        gap = math.log(values[0][0] / values[1][0])
        result |= {"against": config.against, "against_perplexity": values[1][0], "log_perplexity_gap": gap}
    return result


def _layout(config: EvalConfig, model: str) -> Layout:
    directory = resolve(model)
    checkpoint = Checkpoint(directory)
    facts = model_facts(read_config(directory, config.trust_remote_code), model, config.dtype, checkpoint)
    check_headers(facts, checkpoint)
    return arrange(config.model_copy(update={"model": model}), facts, Load())


def _perplexity(
    config: EvalConfig, layout: Layout, table: TokenTable, scratch: str, reporter: Reporter
) -> tuple[float, int]:
    placed = layout.place(output=scratch, scratch=scratch, recipe=None)
    stream = stream_of(table, microbatch_size(config.microbatch, table.length), config.window)
    with Fleet(placed.specs, config.threads, None, reporter.note) as fleet:
        fleet.open()
        step = reporter.pass_begins(f"evaluate {Path(layout.config.model).name}", stream.microbatches)
        loss, tokens = fleet.loss(stream, step)
    return math.exp(loss / tokens), tokens


def sparsity_of(directory: Path, facts: ModelFacts) -> float:
    """Counted zeros / counted weights over the prunable matrices, read one matrix at a time."""
    checkpoint = Checkpoint(directory)
    zeros = 0
    for name, _, _ in facts.linears:
        zeros += int((checkpoint.load([name])[name] == 0).sum())
    return zeros / facts.prunable
