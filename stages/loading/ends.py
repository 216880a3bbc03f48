"""What lies outside the blocks, or is not of the model at all, copied to the output."""

from pathlib import Path

import torch

from espalier.stages.loading.skeleton import Skeleton, read_config
from espalier.stages.storage.hf_checkpoint import Checkpoint, grouped, write_tensors

ENDS_FILE_BYTES = 256 << 20


def copy_ends(skeleton: Skeleton, checkpoint: Checkpoint, output: Path) -> dict[str, list[str]]:
    """Copy every tensor outside the blocks, a few at a time: file in `output` -> tensor names.

    What the model does not read stays bit for bit what it is.
    """
    files: dict[str, list[str]] = {}
    unread = skeleton.storage.unread
    for position, group in enumerate(grouped(skeleton.outside(checkpoint), ENDS_FILE_BYTES)):
        file = f"model-ends-{position:05d}.safetensors"
        names = [entry.name for entry in group]
        tensors = checkpoint.load((name for name in names if name not in unread), dtype=skeleton.weights)
        tensors |= checkpoint.copies(name for name in names if name in unread)
        write_tensors(output / file, tensors)
        files[file] = names
    return files


def copy_unread(source: Path, output: Path, trust_remote_code: bool = False) -> None:
    """Copy what the model in `source` does not read of its checkpoint to `output`, bit for bit, in files of its own."""
    checkpoint = Checkpoint(source)
    skeleton = Skeleton(read_config(source, trust_remote_code), torch.float32, checkpoint=checkpoint)
    unread = [checkpoint.entry(name) for name in skeleton.storage.unread]
    for position, group in enumerate(grouped(unread, ENDS_FILE_BYTES)):
        file = output / f"model-unread-{position:05d}.safetensors"
        write_tensors(file, checkpoint.copies(entry.name for entry in group))
