"""Hidden states as Ray objects: numpy arrays, which Ray's store hands to readers without a copy; bits are unchanged."""

import numpy as np
import torch
from torch import Tensor

from espalier.stages.storage.staging import Room, to_host, upload_made


def pack(hidden: Tensor) -> np.ndarray:
    """The tensor as a numpy array; bfloat16, which numpy lacks, travels as uint16."""
    (hidden,) = to_host([hidden])
    return hidden.view(torch.uint16).numpy() if hidden.dtype == torch.bfloat16 else hidden.numpy()


def unpack(packed: np.ndarray, device: str = "cpu") -> Tensor:
    """The tensor that was packed, on the device, in memory of its own (the store's pages are read-only), where torch
    would put it."""

    def made(room: Room | None) -> Tensor:
        dtype = torch.from_numpy(np.empty(0, packed.dtype)).dtype
        tensor = torch.empty(packed.shape, dtype=dtype) if room is None else room(packed.shape, dtype)
        np.copyto(tensor.numpy(), packed)
        return tensor

    tensor = upload_made(made, device)
    return tensor.view(torch.bfloat16) if packed.dtype == np.uint16 else tensor
