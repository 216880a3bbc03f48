"""`espalier plan`: shards, bytes and memory from a config alone."""

from pathlib import Path
from typing import Any

from pydantic import ByteSize, TypeAdapter, ValidationError

from espalier.pipeline.config.options import build_config
from espalier.pipeline.config.prune import PruneConfig
from espalier.pipeline.planning.hardware import cores, memory_available
from espalier.pipeline.planning.memory import CONTEXT_BYTES, choose_resident, split_blocks
from espalier.pipeline.planning.model_info import ModelInfo
from espalier.pipeline.planning.placement import DRIVER_BYTES, Load, estimates_by_resident
from espalier.pipeline.planning.windows import window_length
from espalier.pipeline.run.new_family import tried_facts
from espalier.stages.devices import has_units
from espalier.stages.errors import Refusal
from espalier.stages.loading.skeleton import read_config
from espalier.stages.precision import Compute, chosen_compute, dtype_of
from espalier.stages.storage.hf_checkpoint import Checkpoint, resolve


def forecast(
    model: str,
    *,
    nodes: int,
    gpus_per_node: int,
    gpu_memory: str,
    memory: str | None,
    shards: int | None,
    samples: int,
    length: str,
    spool_memory: str,
    recipe: str = "balanced",
    reconstruct: str | None = None,
    dtype: str,
    compute: str = "auto",
    tower: str = "language",
) -> dict[str, Any]:
    """What each shard would hold, and whether blocks stay resident, under the recipe of that name, or with another unit
    reconstructed. Reads config.json and headers only.

    A family that nobody has tried is tried small, as `prune` does. Raises Refusal if the model cannot be read, cannot
    be pruned, or does not fit even one block at a time (with the figures).
    """
    path = Path(model)
    directory = path.parent if path.name == "config.json" and path.is_file() else resolve(model)
    config = build_config(
        {
            "model": model,
            "output": "-",
            "calibration": "-",
            "samples": samples,
            "length": length,
            "spool_memory": spool_memory,
            "recipe": recipe,
            **({} if reconstruct is None else {"reconstruct": reconstruct}),
            "dtype": dtype,
            "compute": compute,
            "tower": tower,
        },
        PruneConfig,
    )
    facts = tried_facts(read_config(directory), model, config.dtype, _checkpoint(directory), config.tower)
    chosen_in = _compute(config, facts, gpus_per_node > 0)
    places = nodes * gpus_per_node or shards or min(facts.blocks, cores())
    count = shards or min(places, facts.blocks)
    if gpus_per_node and count > places:
        raise Refusal(f"shards {count}: {nodes} nodes of {gpus_per_node} GPUs hold {places}; one shard a GPU")
    tokens_per_window = window_length(facts, config.length)
    ranges = split_blocks(facts.block_bytes, count, config.block_recipe.blocks_per_unit)
    estimates = estimates_by_resident(
        config, facts, Load.of_pruning(config), tokens_per_window, ranges, gpus_per_node > 0, chosen_in
    )
    room = _gpu_room(gpu_memory) if gpus_per_node else _machine_share(memory, count, nodes)
    resident = choose_resident("auto", estimates, room)
    chosen = estimates[resident]
    return {
        "recipe": config.recipe_name,
        "model": facts.summary() | {"bytes": facts.total_bytes},
        "remarks": list(facts.remarks),
        "compute": chosen_in,
        "tokens": samples * tokens_per_window,
        "resident": resident,
        "memory_per_shard": room,
        "disk": sum(estimate.spool_disk for estimate in chosen) + facts.total_bytes,
        "driver": DRIVER_BYTES,
        "shards": [
            {
                "index": index,
                "first": first,
                "last": last - 1,
                "weights": estimate.weights,
                "training": estimate.training,
                "spool_memory": estimate.spool_memory,
                "spool_disk": estimate.spool_disk,
                "peak": estimate.peak,
                "host": estimate.host,
            }
            for index, ((first, last), estimate) in enumerate(zip(ranges, chosen, strict=True))
        ],
    }


def _checkpoint(directory: Path) -> Checkpoint | None:
    """The headers, which know each tensor's dtype, where there are any."""
    return Checkpoint(directory) if next(directory.glob("*.safetensors"), None) else None


def _compute(config: PruneConfig, facts: ModelInfo, gpu: bool) -> Compute:
    """GPUs of today are taken to have units for either narrow dtype; of CPUs this one is asked."""
    if config.compute != "auto":
        return config.compute
    own = dtype_of(facts.dtype)
    return chosen_compute(own, gpu or has_units(own, "cpu"))


def _machine_share(memory: str | None, shards: int, nodes: int) -> int:
    whole = _bytes(memory, "memory") if memory else memory_available()[0]
    return max(0, whole - DRIVER_BYTES) // -(-shards // nodes)


def _gpu_room(gpu_memory: str) -> int:
    return max(0, _bytes(gpu_memory, "gpu-memory") - CONTEXT_BYTES)


def _bytes(text: str, name: str) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise Refusal(f"{name} {text!r}: not a size; write such as 80GB or 24GiB") from None
