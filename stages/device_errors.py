"""What goes wrong on a device: memory that runs out, which the user can mend, and contexts that are lost for good."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from espalier.stages.errors import Refusal

# Of torch's allocator on the CPU, of CUDA's own, of cuBLAS and cuDNN, which take memory beside torch's.
_NO_MEMORY = re.compile(r"can't allocate memory|out of memory|ALLOC_FAILED|INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED")
_LOST = re.compile(r"\bCUDA (?:kernel )?error\b|\bCUDA driver error\b|uncorrectable (?:NVLink|ECC) error")


def memory_ran_out(error: BaseException) -> bool:
    """Whether `error` says that memory, a device's or the host's, was not there."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))


def context_lost(error: BaseException) -> bool:
    """Whether `error` leaves this process without its device: after an illegal access, a failed assertion in a kernel
    or a broken memory cell whatever the process asks of CUDA fails with the same error."""
    if memory_ran_out(error) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.AcceleratorError) or bool(_LOST.search(str(error)))


@contextmanager
def out_of_memory_refused(doing: str, remedy: str) -> Iterator[None]:
    """Where memory runs out within it, a Refusal that names what was done, what was asked for, and `remedy`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not memory_ran_out(error):
            raise
        asked = " ".join(str(error).split()).partition(" Of the allocated memory")[0] or "out of memory"
        asked = re.sub(r"^.*(DefaultCPUAllocator: )", r"\1", asked).rstrip(". ")
        raise Refusal(f"{doing}: {asked[:300]}; {remedy}; then resume") from None
