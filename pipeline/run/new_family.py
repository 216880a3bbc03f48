"""A model of a family that nobody has tried here: tried small, once, before anything is begun."""

import tempfile
from pathlib import Path

import torch
from platformdirs import user_cache_path
from transformers import PreTrainedConfig

from espalier.stages.loading.skeleton import Skeleton
from espalier.stages.shard.probe import TRIED, probe


def tried(config: PreTrainedConfig) -> tuple[str, ...]:
    """What is to be told of a family that is new here, and works; nothing of one that is known to.

    Raises Refusal that says what differed. What passed is kept in the user's cache, if it can be written to.
    """
    if config.model_type in TRIED:
        return ()
    with tempfile.TemporaryDirectory(prefix="espalier-family-") as home:
        line = probe(Skeleton(config, torch.float32), Path(home), user_cache_path("espalier") / "families.json")
    return () if line is None else (line,)
