"""Which shard owns which blocks, on what the machine or the cluster has: decided before any work starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from espalier.cluster.connection.inventory import Node, nodes, smallest_gpu_bytes, units_everywhere
from espalier.pipeline.config.prune import ClusterConfig, PruneConfig
from espalier.pipeline.planning.hardware import cores, memory_available
from espalier.pipeline.planning.memory import (
    ShardEstimate,
    as_dicts,
    check_host,
    choose_resident,
    estimate_shard,
    free_bytes,
    split_blocks,
)
from espalier.pipeline.planning.model_info import ModelInfo
from espalier.pipeline.planning.windows import microbatch_size, window_length
from espalier.pipeline.record.run_record import Estimate
from espalier.stages.devices import has_units
from espalier.stages.errors import Refusal
from espalier.stages.precision import COMPUTED, Compute, chosen_compute, dtype_of, own_compute
from espalier.stages.shard.block_pruner import Recipe
from espalier.stages.shard.spec import ShardSpec

DRIVER_BYTES = 1_200_000_000
STORE_BYTES = 128 << 20  # the least that Ray's object store is given


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What the shards will have to hold besides weights: windows set aside, and what is done with them."""

    samples: int = 0
    recipe: Recipe | None = None

    @classmethod
    def of_pruning(cls, config: PruneConfig) -> "Load":
        return cls(samples=config.samples, recipe=config.block_recipe)

    @property
    def blocks_per_unit(self) -> int:
        """Blocks that must be on one shard together."""
        return self.recipe.blocks_per_unit if self.recipe else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardLayout:
    """The shards of a run, and what they are expected to need."""

    specs: list[ShardSpec]
    resident: Literal["all", "one"]
    compute: Compute  # what blocks are computed in
    estimate: Estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A run's layout before the cluster is known: what a cluster of its own would be made with."""

    config: ClusterConfig
    facts: ModelInfo
    load: Load
    length: int
    compute: Compute | None  # None: what the cluster has units for
    shards: int | None  # None: as many as the cluster has room for
    local_cpus: int
    local_gpus: int
    object_store_bytes: int

    def place(self, output: str, scratch: str, recipe: Recipe | None) -> ShardLayout:
        """The shards on the connected cluster. Raises Refusal, with the figures, for what does not fit on it."""
        config, facts = self.config, self.facts
        members = nodes()
        device = "cuda" if config.device != "cpu" and any(node.gpus for node in members) else "cpu"
        room = sum(int(node.gpus) if device == "cuda" else int(node.cpus // config.threads) for node in members)
        shards = self.shards or max(1, min(room, -(-facts.blocks // self.load.blocks_per_unit)))
        if shards > room:
            what = "GPUs" if device == "cuda" else f"CPUs for {config.threads} threads each"
            raise Refusal(f"shards {shards}: the cluster has {what} for {room}; give --shards {room} or add nodes")
        ranges = split_blocks(facts.block_bytes, shards, self.load.blocks_per_unit)
        compute = self.compute or chosen_compute(dtype_of(facts.dtype), _units(facts, members, device, config.threads))
        estimates = estimates_by_resident(config, facts, self.load, self.length, ranges, device == "cuda", compute)
        resident = choose_resident(config.resident, estimates, memory_per_process(members, shards, device))
        if device == "cuda":
            check_host(estimates[resident], memory_per_process(members, shards, "cpu"))
        specs = [
            ShardSpec(
                index=index,
                first=first,
                last=last,
                embeds=index == 0,
                heads=index == shards - 1,
                model=config.model if not Path(config.model).exists() else str(Path(config.model).absolute()),
                output=output,
                scratch=scratch,
                length=self.length,
                tower=facts.tower,
                dtype=config.dtype,
                compute=compute,
                device=device,
                resident=resident,
                spool_memory=int(config.spool_memory),
                trust_remote_code=config.trust_remote_code,
                recipe=recipe,
            )
            for index, (first, last) in enumerate(ranges)
        ]
        estimate: Estimate = {"driver": DRIVER_BYTES, "resident": resident, "shards": as_dicts(estimates[resident])}
        return ShardLayout(specs=specs, resident=resident, compute=compute, estimate=estimate)


def arrange(config: ClusterConfig, facts: ModelInfo, load: Load) -> Layout:
    """The layout as far as this machine alone decides it. Raises Refusal for what no cluster could make right."""
    length = window_length(facts, config.length)
    shards = None if config.shards == "auto" else config.shards
    if shards is not None:
        split_blocks(facts.block_bytes, shards, load.blocks_per_unit)
    gpus = _local_gpus() if config.device != "cpu" else 0
    if config.device == "cuda" and not gpus and config.address is None:
        raise Refusal("device cuda: this machine has no CUDA device; use --device cpu or --address of a GPU cluster")
    wanted = shards or min(-(-facts.blocks // load.blocks_per_unit), gpus or max(1, cores() // config.threads))
    compute: Compute | None = None if config.compute == "auto" else config.compute
    if compute is None and config.address is None:  # the cluster will be this machine
        own = dtype_of(facts.dtype)
        compute = chosen_compute(own, has_units(own, "cuda" if gpus else "cpu"))
    microbatch_bytes = length * facts.travels * COMPUTED[compute or "fp32"].itemsize
    microbatch_bytes *= microbatch_size(config.microbatch, length, facts.packed)
    microbatch_bytes *= load.recipe.most_streams if load.recipe else 1
    return Layout(
        config=config,
        facts=facts,
        load=load,
        length=length,
        compute=compute,
        shards=shards,
        local_cpus=wanted * config.threads,
        local_gpus=gpus,
        object_store_bytes=STORE_BYTES + 2 * config.window * wanted * microbatch_bytes,
    )


def estimates_by_resident(
    config: ClusterConfig,
    facts: ModelInfo,
    load: Load,
    length: int,
    ranges: list[tuple[int, int]],
    gpu: bool,
    compute: Compute,
) -> dict[str, list[ShardEstimate]]:
    """Each shard's estimate, with all its blocks in memory and with one at a time."""
    return {
        resident: [
            estimate_shard(
                facts,
                first,
                last,
                compute=compute,
                resident=resident,
                samples=load.samples,
                length=length,
                microbatch=microbatch_size(config.microbatch, length, facts.packed),
                spool_memory=int(config.spool_memory),
                recipe=load.recipe,
                gpu=gpu,
            )
            for first, last in ranges
        ]
        for resident in ("all", "one")
    }


def check_disk(output: Path, facts: ModelInfo) -> None:
    """Raises Refusal if the pruned model cannot fit where it is to go."""
    if (free := free_bytes(output)) < facts.total_bytes:
        raise Refusal(
            f"output {output}: the pruned model takes {facts.total_bytes / 1e9:.2f} GB, the disk has "
            f"{free / 1e9:.2f} GB free; give a directory on a larger one"
        )


def _units(facts: ModelInfo, members: list[Node], device: str, threads: int) -> bool:
    """Whether all that may hold a shard of the connected cluster have units for the model's dtype."""
    places = [node.node_id for node in members if node.cpus >= threads]
    return own_compute(dtype_of(facts.dtype)) == "fp32" or units_everywhere(dtype_of(facts.dtype), device, places)


def memory_per_process(members: list[Node], processes: int, device: str) -> int:
    """Bytes that each of so many shards, or ranks, may take on the tightest node, spread evenly."""
    if device == "cuda":
        return smallest_gpu_bytes()
    if len(members) == 1:
        return max(0, memory_available()[0] - DRIVER_BYTES) // processes
    share = -(-processes // len(members))
    return min(node.memory_bytes for node in members) // share


def _local_gpus() -> int:
    import torch

    return torch.cuda.device_count()
