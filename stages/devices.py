"""What is known of the device that tensors lie on. Whatever names a kind of device by its name asks here."""

import torch


def on_accelerator(device: torch.device | str) -> bool:
    """Whether tensors there lie in memory that is not the host's: a copy to or from it is a transfer."""
    return torch.device(device).type not in ("cpu", "meta")


def matrix_units_bf16(device: torch.device) -> bool:
    """True where bf16 matrix products run on units of their own, several times faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def allocated_peak(device: torch.device | str) -> int | None:
    """Most bytes that this process's tensors took there since it began; None where the host's memory is what counts."""
    return int(torch.cuda.max_memory_allocated(device)) if torch.device(device).type == "cuda" else None
