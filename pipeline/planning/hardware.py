"""The hardware of this machine: cores, memory inside a container's limit, the speed of a matrix product."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

SECONDS_TO_MEASURE = 0.3
CGROUP = Path("/sys/fs/cgroup")


def cores() -> int:
    """How many cores this process may be scheduled on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota() -> float | None:
    """How many cores the container may use, None without a limit."""
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def memory_available() -> tuple[int, int, bool]:
    """(bytes available, bytes in all, whether a container's limit is the smaller one)."""
    machine = psutil.virtual_memory()
    for limit_file, used_file, statistics in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        try:
            limit, used = (int((CGROUP / file).read_text()) for file in (limit_file, used_file))
            lines = (CGROUP / statistics).read_text().splitlines()
        except (OSError, ValueError):  # no such cgroup version, or "max"
            continue
        if limit < machine.total:
            # File pages that nothing has touched lately count as used, but are given back on demand.
            reclaimable = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
            return min(machine.available, limit - used + reclaimable), limit, True
    return machine.available, machine.total, False


def gflops(dtype: "torch.dtype", device: "torch.device") -> float:
    """What a square matrix product reaches, in 10⁹ operations a second, over about 0.3 s."""
    import torch

    size = 4096 if device.type == "cuda" else 512  # where bf16 is imitated, even a product of 1024 takes seconds
    generator = torch.Generator(device=device).manual_seed(0)
    matrix = torch.randn(size, size, generator=generator, device=device).to(dtype)
    out = torch.mm(matrix, matrix)  # the first product also chooses and builds the kernel

    def finish() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now = finish()
    products = 0
    while now - start < SECONDS_TO_MEASURE:
        torch.mm(matrix, matrix, out=out)
        products += 1
        now = finish()
    return products * 2 * size**3 / (now - start) / 1e9
