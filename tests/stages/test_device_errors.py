"""What runs out is told with its remedy; what is lost for good is known by what libraries say of it."""

import pytest
import torch

from espalier.stages.device_errors import context_lost, memory_ran_out, out_of_memory_refused
from espalier.stages.errors import Refusal

NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.AcceleratorError("CUDA error: out of memory"),
]
LOST = [
    torch.AcceleratorError("CUDA error: device-side assert triggered\nCUDA kernel errors might be reported later"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA driver error: unspecified launch failure"),
    RuntimeError("CUDA error: uncorrectable ECC error encountered"),
]
NEITHER = [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("CUDA error: no"), Refusal("no")]


@pytest.mark.parametrize("error", [*NO_MEMORY, *LOST, *NEITHER], ids=lambda error: str(error)[:40])
def test_errors_are_told_apart(error: Exception) -> None:
    assert memory_ran_out(error) == (error in NO_MEMORY)
    assert context_lost(error) == (error in LOST)


def test_memory_that_ran_out_is_one_line_with_the_need_and_the_remedy() -> None:
    said = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.30 GiB is "
        "free. Of the allocated memory 70 GiB is allocated by PyTorch\nand more"
    )
    with (
        pytest.raises(Refusal) as told,
        out_of_memory_refused("block 3, reconstruct of mlp on cuda", "use a smaller --batch"),
    ):
        raise torch.OutOfMemoryError(said)
    assert str(told.value) == (
        "block 3, reconstruct of mlp on cuda: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total "
        "capacity of 79.15 GiB of which 1.30 GiB is free; use a smaller --batch; then resume"
    )


def test_what_the_cpu_could_not_give_is_told_too() -> None:
    line = r"^block 0: DefaultCPUAllocator: can't allocate memory.*; use less; then resume$"
    with pytest.raises(Refusal, match=line), out_of_memory_refused("block 0", "use less"):
        torch.empty(1 << 62, dtype=torch.uint8)


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_refused("block 0", "use less"):
        raise RuntimeError("shapes")
