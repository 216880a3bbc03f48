"""What blocks are computed in, apart from what their weights are stored in.

Weights stay in memory as they lie on disk. A module notes for each of its tensors the dtype in which transformers would
load it for the arithmetic that was asked for (norms or routers that a family keeps in float32 among them), and holds
casts in their place while it runs.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from espalier.stages.errors import Refusal
from espalier.stages.storage.headers import DTYPES
from espalier.stages.storage.hf_checkpoint import Checkpoint

Compute = Literal["fp32", "bf16", "fp16"]
COMPUTED: dict[Compute, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NARROW: dict[torch.dtype, Compute] = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}  # dtypes that need units to be fast


def dtype_of(name: str) -> torch.dtype:
    """The dtype of that name in torch."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def named_dtype(name: str) -> torch.dtype | None:
    """The dtype of that name in torch; None for "auto"."""
    return None if name == "auto" else dtype_of(name)


def weights_dtype(config: PreTrainedConfig, wanted: str = "auto", checkpoint: Checkpoint | None = None) -> torch.dtype:
    """The dtype that is wanted for the weights; for "auto" the one that most of the checkpoint's are stored in (without
    a checkpoint: that config.json names, or float32)."""
    if (named := named_dtype(wanted)) is not None:
        return named
    elements: Counter[str] = Counter()
    for entry in checkpoint.entries.values() if checkpoint is not None else ():
        if entry.dtype in DTYPES:
            elements[entry.dtype] += entry.elements
    if elements:
        return DTYPES[elements.most_common(1)[0][0]]
    return getattr(config, "dtype", None) or torch.float32


def own_compute(dtype: torch.dtype) -> Compute:
    """The arithmetic in which weights of `dtype` are exact."""
    return NARROW.get(dtype, "fp32")


def chosen_compute(dtype: torch.dtype, units: bool) -> Compute:
    """What `auto` stands for: the weights' own `dtype` where there are units for it, else fp32."""
    return own_compute(dtype) if units else "fp32"


def note_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Give each tensor of an empty model the dtype that transformers would load it in, and let its module note it.

    Returns it by the tensor's name in the model.
    """
    plan = model._get_dtype_plan(dtype)  # parts of names -> float32
    wide = re.compile("|".join(part.replace("*", ".*") for part in plan)) if plan else None
    noted: dict[str, torch.dtype] = {}
    for prefix, module in model.named_modules():
        computed: dict[str, torch.dtype] = {}
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None or not tensor.is_floating_point() or name in module._non_persistent_buffers_set:
                    continue
                whole = f"{prefix}.{name}" if prefix else name
                if wide is not None and wide.search(whole) and tensor.dtype != torch.float32:
                    tensor = held[name] = _like(tensor, tensor.float())
                computed[name] = noted[whole] = tensor.dtype
        module.__dict__["computed"] = computed
    return noted


def _like(tensor: Tensor, cast: Tensor) -> Any:
    return nn.Parameter(cast, requires_grad=False) if isinstance(tensor, nn.Parameter) else cast


@contextmanager
def computing(module: nn.Module) -> Iterator[None]:
    """Within it, `module` holds its tensors in the dtypes that it computes in; then again as they are stored.

    A tensor that is stored in its dtype is not copied, so within another one of the same module this does nothing.
    """
    stored: list[tuple[Any, str, Tensor]] = []
    try:
        for part in module.modules():
            for name, dtype in part.__dict__.get("computed", {}).items():
                held: Any = part._parameters if name in part._parameters else part._buffers
                tensor = held[name]
                if tensor is not None and tensor.dtype != dtype:
                    stored.append((held, name, tensor))
                    held[name] = _like(tensor, tensor.detach().to(dtype))
        yield
    finally:
        for held, name, tensor in stored:
            held[name] = tensor


def check_range(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Raises Refusal for a finite weight that `dtype`, what blocks are computed in, cannot hold."""
    if dtype != torch.float16:
        return  # float32's range is bfloat16's, but for the last half of a per cent of it
    most = torch.finfo(dtype).max
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype != dtype and tensor.numel():
            largest = float(tensor.abs().max())
            if largest > most:
                raise Refusal(f"{name}: a weight of {largest:g}, and fp16 ends at {most:g}; use --compute bf16 or fp32")


def as_saved(tensors: Mapping[str, Tensor], checkpoint: Checkpoint, wanted: torch.dtype | None) -> dict[str, Tensor]:
    """Tensors by their names in the checkpoint, in `wanted` or in the dtypes that they have there: only experts that
    share a tensor of the model can have come away from them."""
    saved = {}
    for name, tensor in tensors.items():
        own = wanted or DTYPES.get(checkpoint.entry(name).dtype, tensor.dtype)
        saved[name] = tensor.to(own) if tensor.is_floating_point() else tensor
    return saved


def fitted_in(dtype: torch.dtype) -> torch.dtype:
    """What units are fitted in where blocks are computed in `dtype`: gradients can be too small for float16."""
    return torch.float32 if dtype == torch.float16 else dtype


def cast_for_good(module: nn.Module, dtype: torch.dtype) -> None:
    """Put the floating-point tensors of `module` into `dtype`, but those that it computes in float32 into that."""
    for part in module.modules():
        computed: dict[str, torch.dtype] = part.__dict__.get("computed", {})
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor.is_floating_point():
                    own = torch.float32 if computed.get(name) == torch.float32 else dtype
                    tensor.data = tensor.data.to(own)
