"""What the cluster's accelerators hold, asked on the nodes that have them."""

import ray
import torch


@ray.remote(num_gpus=1, scheduling_strategy="SPREAD")
def _gpu_bytes() -> int:
    return torch.cuda.get_device_properties(0).total_memory


def smallest_gpu_bytes() -> int:
    """Memory of the smallest GPU in the connected cluster, one asked for each that Ray counts."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    return min(ray.get([_gpu_bytes.remote() for _ in range(gpus)]))
