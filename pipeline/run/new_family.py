"""What is known of a model before a run begins; a family that is not among those tested is tried small, once."""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from platformdirs import user_cache_path
from transformers import PreTrainedConfig

from espalier.pipeline.planning.model_info import ModelInfo, model_facts
from espalier.stages.loading.skeleton import Skeleton
from espalier.stages.model.families import Tower
from espalier.stages.shard.probe import TRIED, Use, probe
from espalier.stages.storage.hf_checkpoint import Checkpoint


def tried_facts(
    config: PreTrainedConfig,
    path: str,
    dtype: str = "auto",
    checkpoint: Checkpoint | None = None,
    tower: Tower = "language",
    use: Use = "prune",
) -> ModelInfo:
    """`model_facts` of a model that can be used so; `remarks` is all that is to be told of it.

    Raises Refusal as `model_facts` and `tried` do.
    """
    facts = model_facts(config, path, dtype, checkpoint, tower)
    return replace(facts, remarks=(*facts.remarks, *tried(config, use)))


def tried(config: PreTrainedConfig, use: Use = "prune") -> tuple[str, ...]:
    """What is to be told of a family that is new here, and works; nothing of one that is known to.

    Raises Refusal that says what differed. What passed is kept in the user's cache, if it can be written to.
    """
    if config.model_type in TRIED:
        return ()
    with tempfile.TemporaryDirectory(prefix="espalier-family-") as home:
        line = probe(Skeleton(config, torch.float32), Path(home), user_cache_path("espalier") / "families.json", use)
    return () if line is None else (line,)
