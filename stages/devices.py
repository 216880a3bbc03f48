"""What is known of the device that tensors lie on. Whatever names a kind of device by its name asks here."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


def on_accelerator(device: torch.device | str) -> bool:
    """Whether tensors there lie in memory that is not the host's: a copy to or from it is a transfer."""
    return torch.device(device).type not in ("cpu", "meta")


def beside(device: torch.device | str) -> Callable[[], AbstractContextManager[None]]:
    """A context for another thread: within it operations on `device` follow what has been asked of it until now, and do
    not wait for what is asked later. Left when they are done."""
    if torch.device(device).type != "cuda":
        return nullcontext
    so_far = torch.cuda.current_stream(device).record_event()

    @contextmanager
    def aside() -> Iterator[None]:
        stream = torch.cuda.Stream(device)
        stream.wait_event(so_far)
        with torch.cuda.stream(stream):
            yield
            stream.synchronize()

    return aside


def copies_apart(device: torch.device | str) -> bool:
    """Whether copies to and from there can run beside the computing, on streams of their own."""
    return on_accelerator(device) and hasattr(torch.get_device_module(device), "Stream")


# Of a processor's capabilities, as torch names them, those that multiply matrices of a dtype.
UNITS = {torch.bfloat16: ("amx_bf16", "avx512_bf16", "bf16"), torch.float16: ("amx_fp16", "avx512_fp16", "fp16")}


def has_units(dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether matrix products of `dtype` run on units of their own there, as fast as float32's at least.

    On a CPU also oneDNN, which computes them, must see the units: where it is limited to lesser instructions
    (ONEDNN_MAX_CPU_ISA) they are imitated, a hundred times slower.
    """
    kind = torch.device(device).type
    if dtype not in UNITS:
        return dtype == torch.float32
    if kind == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu" or not any(torch.cpu.get_capabilities().get(unit, False) for unit in UNITS[dtype]):
        return False
    seen: bool = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }[dtype]()
    return seen


def allocated_peak(device: torch.device | str) -> int | None:
    """Most bytes that this process's tensors took there since it began; None where the host's memory is what counts."""
    return int(torch.cuda.max_memory_allocated(device)) if torch.device(device).type == "cuda" else None


@contextmanager
def bfloat16_factors(device: torch.device | str, exact: bool) -> Iterator[None]:
    """Within it, if `exact` (the factors are bfloat16 numbers), float32 products there may round their factors.

    On CUDA to TF32, on a CPU to bfloat16, where it has the units: without them (imitated by ONEDNN_MAX_CPU_ISA=AVX2) a
    product of 512 x 1024 took 94 ms so and 21 ms in float32. A setting of the process: no other thread may multiply
    meanwhile.
    """
    kind = torch.device(device).type
    backend, rounded = (torch.backends.cuda, "tf32") if kind == "cuda" else (torch.backends.mkldnn, "bf16")
    setting: Any = getattr(backend, "matmul", None)  # torch 2.9 and later; before, full float32
    if not exact or not has_units(torch.bfloat16, device) or not hasattr(setting, "fp32_precision"):
        yield
        return
    before = setting.fp32_precision
    setting.fp32_precision = rounded
    try:
        yield
    finally:
        setting.fp32_precision = before


@contextmanager
def deterministic() -> Iterator[None]:
    """Within it torch uses deterministic algorithms alone, and raises RuntimeError where an operation has none.

    Attention's backward pass on CUDA is deterministic only so (not if torch is to warn instead of raising). Memory is
    not filled beforehand: nothing reads what was not written.
    """
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # a module with a property that its types do not tell
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        memory.fill_uninitialized_memory = filled
