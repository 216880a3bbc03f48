"""What the cluster's accelerators hold, asked on the nodes that have them."""

from collections.abc import Sequence

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from stages.devices import has_units


@ray.remote(num_gpus=1, scheduling_strategy="SPREAD")
def _gpu_bytes() -> int:
    return torch.cuda.get_device_properties(0).total_memory


def smallest_gpu_bytes() -> int:
    """Memory of the smallest GPU in the connected cluster, one asked for each that Ray counts."""
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
