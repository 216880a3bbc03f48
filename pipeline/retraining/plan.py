"""The plan of a training run before it starts: where its ranks are, how many steps, which micro-batches."""

import hashlib
import math
from pathlib import Path
from typing import cast

import torch

from espalier.cluster.rank_group import RankGroup
from espalier.pipeline.config.retrain import RetrainConfig
from espalier.pipeline.planning.hardware import cores
from espalier.pipeline.planning.model_info import ModelInfo, check_headers
from espalier.pipeline.planning.windows import window_length
from espalier.pipeline.run.new_family import tried_facts
from espalier.stages.data.training_batches import Sources, open_source
from espalier.stages.errors import Refusal
from espalier.stages.loading.skeleton import read_config
from espalier.stages.storage.hf_checkpoint import Checkpoint, resolve
from espalier.stages.training.model import check_mask, has_weights
from espalier.stages.training.spec import Precision, RetrainSpec

MICROBATCH_TOKENS = 8192
# What the ranks are told as the user said it.
SAME = (
    *("zero_stage", "offload", "batch", "learning_rate", "schedule", "warmup", "weight_decay", "beta2", "clip"),
    *("seed", "eval_every", "checkpoint_every", "activation_checkpointing", "trust_remote_code"),
)


def inspect(config: RetrainConfig) -> tuple[ModelInfo, str]:
    """The model's sizes, and a digest of what it begins from. Raises Refusal for a model or mask that cannot be."""
    model = resolve(config.model)
    settings = read_config(model, config.trust_remote_code)
    checkpoint = Checkpoint(model) if has_weights(model) else None
    facts = tried_facts(settings, config.model, config.dtype, checkpoint, use="train")
    window_length(facts, config.length)
    if config.mask is not None:
        check_mask(model, resolve(config.mask), config.trust_remote_code)
    if checkpoint is None:
        return facts, hashlib.sha256((model / "config.json").read_bytes()).hexdigest()
    return facts, check_headers(facts, checkpoint)


def devices(config: RetrainConfig, dtype: str, given: RankGroup | None) -> tuple[str, int]:
    """("cpu" or "cuda", how many ranks); `given` are ranks that run already.

    Raises Refusal for what these devices cannot do. On somebody's cluster, `auto` counts what this machine has, and
    the cluster is asked when it is connected.
    """
    if given is not None:
        if config.ranks not in ("auto", given.ranks):
            raise Refusal(f"ranks {config.ranks}: the ranks that are running are {given.ranks}")
        device, ranks = given.device, given.ranks
    else:
        gpus = torch.cuda.device_count()
        device = config.device if config.device != "auto" else "cuda" if gpus else "cpu"
        room = gpus if device == "cuda" else cores() // config.threads
        ranks = max(1, room) if config.ranks == "auto" else config.ranks
        if ranks > room and config.address is None:
            what = "GPUs" if device == "cuda" else f"CPU cores, at {config.threads} a rank,"
            raise Refusal(f"ranks {ranks}: this machine has {what} for {room}; use --ranks {room}, or a cluster")
    if dtype == "float16" and device == "cpu":
        raise Refusal("dtype float16 on a CPU: DeepSpeed trains it on GPUs only; use --dtype bfloat16 or float32")
    if config.batch % ranks:
        raise Refusal(f"batch {config.batch}: does not divide among {ranks} ranks; give a multiple of it")
    if config.microbatch != "auto" and config.batch % (config.microbatch * ranks):
        raise Refusal(
            f"microbatch {config.microbatch}: {ranks} ranks x {config.microbatch} does not divide the batch of "
            f"{config.batch}; change one of the three"
        )
    return device, ranks


def spec_of(config: RetrainConfig, dtype: str, length: int, ranks: int, home: Path, sources: Sources) -> RetrainSpec:
    """What the ranks are told."""
    return RetrainSpec(
        model=str(resolve(config.model)),
        mask=None if config.mask is None else str(resolve(config.mask)),
        home=str(home),
        data=sources.data,
        eval=sources.eval,
        masked=config.holds_zeros,
        dtype=cast(Precision, dtype),
        steps=steps_of(config, len(open_source(sources.data)), length),
        microbatch=microbatch_of(config, length, ranks),
        shadow=config.shadow_spec,
        **{name: getattr(config, name) for name in SAME},
    )


def steps_of(config: RetrainConfig, examples: int, length: int) -> int:
    """Optimizer steps, from steps, tokens or passes over so many examples."""
    if config.steps is not None:
        return config.steps
    if config.tokens is not None:
        return math.ceil(config.tokens / (config.batch * length))
    return max(1, round((config.epochs or 1) * examples / config.batch))


def microbatch_of(config: RetrainConfig, length: int, ranks: int) -> int:
    """Windows in a forward pass: as asked, or the largest divisor of a rank's share that is not too many tokens."""
    if config.microbatch != "auto":
        return config.microbatch
    share, most = config.batch // ranks, max(1, MICROBATCH_TOKENS // length)
    return max(size for size in range(1, share + 1) if share % size == 0 and size <= most)
