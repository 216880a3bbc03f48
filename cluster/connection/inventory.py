"""What the cluster's accelerators hold, asked on the nodes that have them."""

from collections.abc import Sequence
from dataclasses import dataclass

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from espalier.stages.devices import has_units


@dataclass(frozen=True)
class Node:
    """One machine (raylet) of the cluster and what Ray may schedule there, not what is free now."""

    node_id: str
    address: str
    cpus: float
    gpus: float
    memory_bytes: int
    object_store_bytes: int


def nodes() -> list[Node]:
    """The live nodes of the connected cluster, in the order of their ids."""
    live = [
        Node(
            node_id=entry["NodeID"],
            address=entry["NodeManagerAddress"],
            cpus=entry["Resources"].get("CPU", 0.0),
            gpus=entry["Resources"].get("GPU", 0.0),
            memory_bytes=int(entry["Resources"].get("memory", 0)),
            object_store_bytes=int(entry["Resources"].get("object_store_memory", 0)),
        )
        for entry in ray.nodes()
        if entry["Alive"]
    ]
    return sorted(live, key=lambda node: node.node_id)


GPU_RESERVE = 1 << 30  # of a GPU's free memory: what cuBLAS and cuDNN take beside torch, and what torch cannot fill


@ray.remote(num_gpus=1, scheduling_strategy="SPREAD")
def _gpu_bytes() -> int:
    free, _ = torch.cuda.mem_get_info(0)  # less what others hold, and this process's own CUDA context
    return max(0, free - GPU_RESERVE)


def smallest_gpu_bytes() -> int:
    """Free memory, less a reserve, of the GPU in the connected cluster that has least, one asked for each that Ray
    counts."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    return min(ray.get([_gpu_bytes.remote() for _ in range(gpus)]))


@ray.remote(num_cpus=0)
def _has_units(dtype: torch.dtype, device: str) -> bool:
    return has_units(dtype, device)


def units_everywhere(dtype: torch.dtype, device: str, nodes: Sequence[str]) -> bool:
    """Whether products of `dtype` run on units of their own on all those nodes, or on each GPU that Ray counts."""
    if device == "cuda":
        gpus = int(ray.cluster_resources().get("GPU", 0))
        spread = _has_units.options(num_gpus=1, scheduling_strategy="SPREAD")
        return all(ray.get([spread.remote(dtype, device) for _ in range(gpus)]))
    places = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    return all(ray.get([_has_units.options(scheduling_strategy=place).remote(dtype, device) for place in places]))
