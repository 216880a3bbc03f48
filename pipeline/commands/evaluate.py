"""`espalier eval`: perplexity of a checkpoint, and how far it is from another, run shard by shard, so that no process
holds either whole."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from espalier.cluster.connection.connect import connect
from espalier.cluster.connection.folders import own_folder
from espalier.cluster.shard_group import ShardGroup
from espalier.pipeline.config.prune import EvalConfig
from espalier.pipeline.planning.model_info import check_headers
from espalier.pipeline.planning.placement import Layout, Load, arrange
from espalier.pipeline.planning.windows import microbatch_size
from espalier.pipeline.run.export import sparsity_of
from espalier.pipeline.run.inputs import bos_for, load_tokenizer, stream_of, tell
from espalier.pipeline.run.new_family import tried_facts
from espalier.pipeline.run.progress import Reporter, reporter_for
from espalier.stages.data.token_table import TokenTable, build_token_table
from espalier.stages.errors import Refusal
from espalier.stages.loading.skeleton import read_config
from espalier.stages.metrics.perplexity import Measures
from espalier.stages.shard.spec import ShardSpec
from espalier.stages.storage.hf_checkpoint import Checkpoint, resolve


def evaluate(config: EvalConfig, reporter: Reporter | None = None) -> dict[str, Any]:
    """Perplexity and sparsity of `config.model`, and of `config.against` on the same windows.

    Keys: model, compute, perplexity, tokens, windows, length, sparsity; with `against` also against,
    against_perplexity, log_perplexity_gap and kl, that is KL(against || model), both in nats a token, and
    top1_agreement, the share of positions where both find the same token likeliest. Raises Refusal for what cannot
    work, before Ray starts.
    """
    reporter = reporter or reporter_for(Console(stderr=True))
    models = [config.model, *([config.against] if config.against else [])]
    layouts = [_layout(config, model) for model in models]
    length = min(layout.length for layout in layouts)
    if len({layout.facts.vocabulary for layout in layouts}) > 1:
        sizes = " and ".join(str(layout.facts.vocabulary) for layout in layouts)
        raise Refusal(f"against {config.against}: vocabularies of {sizes} tokens; compare models of one tokenizer")
    home = Path(config.scratch).expanduser().absolute() if config.scratch else None
    with own_folder(home) as scratch, ExitStack() as held:
        held.callback(reporter.close)
        table = build_token_table(
            config.data,
            load_tokenizer(config.model, config.trust_remote_code),
            length=length,
            samples=None,
            seed=0,
            path=scratch / "tokens.arrow",
            vocab_size=layouts[0].facts.vocabulary,
            purpose="evaluation",
            bos=bos_for(config.bos, layouts[0].facts.family),
            text_column=config.text_column,
        )
        tell(table, reporter.note)
        for remark in dict.fromkeys(remark for layout in layouts for remark in layout.facts.remarks):
            reporter.note(f"warning: {remark}")
        held.enter_context(
            connect(
                config.address,
                cpus=max(layout.local_cpus for layout in layouts),
                gpus=max(layout.local_gpus for layout in layouts),
                object_store_bytes=max(layout.object_store_bytes for layout in layouts),
            )
        )
        specs, *others = (
            layout.place(output=str(scratch), scratch=str(scratch), recipe=None).specs for layout in layouts
        )
        for other in others:
            against = _measures(config, other, table, reporter, "kept")
            specs[-1] = replace(specs[-1], reference=other[-1].model, reference_compute=other[-1].compute)
        measures = _measures(config, specs, table, reporter, "compared" if others else "measures")
    result: dict[str, Any] = {
        "model": config.model,
        "compute": specs[0].compute,
        "perplexity": measures.perplexity,
        "tokens": measures.tokens,
        "windows": len(table),
        "length": length,
        "sparsity": sparsity_of(resolve(config.model), config.trust_remote_code),
    }
    if others:
        result |= {
            "against": config.against,
            "against_perplexity": against.perplexity,
            "log_perplexity_gap": measures.nats / measures.tokens - against.nats / against.tokens,
            "kl": measures.kl,
            "top1_agreement": measures.top1_agreement,
        }
    return result


def _layout(config: EvalConfig, model: str) -> Layout:
    directory = resolve(model)
    checkpoint = Checkpoint(directory)
    settings = read_config(directory, config.trust_remote_code)
    facts = tried_facts(settings, model, config.dtype, checkpoint)
    check_headers(facts, checkpoint)
    return arrange(config.model_copy(update={"model": model}), facts, Load())


def _measures(
    config: EvalConfig,
    specs: Sequence[ShardSpec],
    table: TokenTable,
    reporter: Reporter,
    wanted: Literal["measures", "kept", "compared"],
) -> Measures:
    """Of one model; "compared" with the one whose hidden states were "kept" before it."""
    stream = stream_of(table, microbatch_size(config.microbatch, table.length), config.window)
    with ShardGroup(specs, config.threads, None, reporter.note) as group:
        group.open()
        step = reporter.pass_begins(f"evaluate {Path(specs[0].model).name}", stream.microbatches)
        return group.measure(stream, step, wanted=wanted)
