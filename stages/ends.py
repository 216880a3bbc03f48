"""What lies outside the blocks, copied to the output."""

from pathlib import Path

from stages.checkpoint import Checkpoint, grouped, write_tensors
from stages.skeleton import Skeleton

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
        tensors = checkpoint.load((name for name in names if name not in unread), dtype=skeleton.dtype)
        tensors |= checkpoint.copies(name for name in names if name in unread)
        write_tensors(output / file, tensors)
        files[file] = names
    return files
