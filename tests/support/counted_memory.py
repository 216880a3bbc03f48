"""Peak bytes of tensors, counted: of real ones on the host, or of ones without memory at any size.

    with Counted() as counted:
        fit(...)
    counted.peak, counted.live

Each storage counts once, whatever views of it there are, from the operation that makes it (or first meets it) until its
last reference goes, autograd's among them. Not counted is what a kernel takes for itself and gives back, but for
attention's backward pass on a GPU, whose reserve is known.

On the meta device the same code runs as on an accelerator, in no memory. Numbers are asked for there, too: a mask is
then taken to choose everything, a check to hold, a factorisation to succeed.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
PROCESSORS = 132  # multiprocessors of an H100: over so many attention's deterministic backward pass is split


class Counted(TorchDispatchMode):
    """Within it bytes are counted. `live`: at the moment; `peak`: the most since it began, or since `restart`.

    `what`: the operation at the peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._counted = self._looked_at = (
            0  # bytes of those, some of them gone by now; how many were left of the last look
        )
        self.peak, self.what = 0, ""

    @property
    def live(self) -> int:
        for key in [key for key, (storage, _) in self._alive.items() if storage.expired()]:
            self._counted -= self._alive.pop(key)[1]
        self._looked_at = len(self._alive)
        return self._counted

    def restart(self) -> int:
        """Count the peak from here; what lives now."""
        self.peak = self.live
        return self.peak

    def _meet(self, tensors: Any) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._alive:  # held weakly: no other storage gets that place
                    self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    self._counted += storage.nbytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in ANSWERED and any(isinstance(t, Tensor) and t.is_meta for t in tree_leaves(args)):
            result = ANSWERED[func](func, *args, **kwargs)
        else:
            result = func(*args, **kwargs)
        self._meet((args, kwargs, result))
        reserve = _attention_reserve(*args) if func is FLASH_BACKWARD else 0
        if self._counted + reserve > self.peak or len(self._alive) > 2 * self._looked_at + 64:
            now = self.live + reserve
            if now > self.peak:
                self.peak, self.what = now, str(func)
        return result


# -- what the meta device cannot answer --------------------------------------------------------------------------------


def _number(func: Any, tensor: Tensor) -> Any:
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.is_floating_point() else 0


def _all_places(func: Any, tensor: Tensor) -> Tensor:
    return torch.empty(tensor.numel(), tensor.ndim, dtype=torch.int64, device=tensor.device)


def _chosen(func: Any, tensor: Tensor, indices: list[Tensor | None], *rest: Any) -> Tensor:
    """With a mask all rows are chosen."""
    whole = [
        torch.empty(index.numel(), dtype=torch.int64, device=tensor.device)
        if index is not None and index.dtype == torch.bool
        else index
        for index in indices
    ]
    return func(tensor, whole, *rest)


def _copied(func: Any, tensor: Tensor, **named: Any) -> Tensor:
    device = named.get("device")
    if device is None or torch.device(device).type == "meta":
        return func(tensor, **named)
    return torch.zeros(tensor.shape, dtype=named.get("dtype") or tensor.dtype, device=device)


ANSWERED: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: _number,
    aten.equal.default: lambda func, one, other: False,
    aten.nonzero.default: _all_places,
    aten.index.Tensor: _chosen,
    aten.index_put_.default: lambda func, tensor, indices, values, *rest: tensor,
    aten._to_copy.default: _copied,
}

# -- attention as a GPU computes it ------------------------------------------------------------------------------------

FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_backward.default


def _attention_reserve(gradient: Tensor, query: Tensor, key: Tensor, *_: Any) -> int:
    """What the deterministic backward pass takes beside its results, in (samples, heads, length, channels): the
    queries' gradient in float32, a copy for each share of the processors; and where several heads read one key, the
    gradients of keys and values for each head."""
    if not query.is_meta:
        return 0
    samples, heads, length, channels = query.shape
    copies = math.ceil(PROCESSORS / (samples * heads))
    expanded = 2 * query.element_size() if key.shape[1] != heads else 0
    return samples * heads * length * channels * (4 * copies + expanded)


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention by the kernel that a GPU would choose, for tensors without memory."""
    return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
