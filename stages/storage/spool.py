"""Activations set aside between the stream and the work: in memory up to a budget, then in Arrow files on disk.

One record is one sample. What goes to disk is read back with plain reads, not through a memory map: mapped pages would
count as the process's memory, and its bound is a promise.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from espalier.stages.errors import Refusal
from espalier.stages.storage.staging import Lane, Room, download

_SCHEMA = pa.schema([("sample", pa.large_binary())])


class SpoolBudget:
    """Bytes of memory that a shard's spools may hold together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.peak = 0
        self._left = 0  # to other work

    @contextlib.contextmanager
    def leaving(self, room: int) -> Iterator[None]:
        """Within it, what is taken leaves so many of the bytes for work in the same memory."""
        self._left += room
        try:
            yield
        finally:
            self._left -= room

    def take(self, wanted: int) -> bool:
        """True, and counted, if `wanted` more bytes fit."""
        if self.used + self._left + wanted > self.limit:
            return False
        self.used += wanted
        self.peak = max(self.peak, self.used)
        return True

    def give_back(self, freed: int) -> None:
        self.used -= freed


class Spool:
    """A sequence of samples, each (length, channels) of one dtype, appended once and read in any order.

    Bits go in and come out unchanged. Lengths may differ, as those of images of several sizes do. `close` frees the
    memory and removes the file. What comes from a device has its place at once and arrives later, before it is read.
    """

    def __init__(self, path: Path, budget: SpoolBudget) -> None:
        self._path, self._budget = path, budget
        self._held: list[Tensor] = []  # the first samples, in memory
        self._on_disk = self._spilled = 0  # records in the file; how many of them are the first samples, at its end
        self._writer: pa.ipc.RecordBatchFileWriter | None = None
        self._reader: pa.ipc.RecordBatchFileReader | None = None
        self._lengths: set[int] = set()
        self._channels = self._disk_bytes = 0
        self._dtype = torch.float32
        self._coming: Lane | None = None  # what still delivers some of the samples
        self._delivered = self._expected = 0
        self._life = object()  # until it is closed

    def __len__(self) -> int:
        return len(self._held) + self._on_disk

    @property
    def disk_bytes(self) -> int:
        return self._disk_bytes

    @property
    def ragged(self) -> bool:
        """Whether samples differ in length."""
        return len(self._lengths) > 1

    def append(self, samples: Tensor) -> None:
        """Add samples (n, length, channels). Raises Refusal when neither the budget nor the disk has room."""
        samples = samples.detach()
        if not len(samples):
            return
        self._channels, self._dtype = samples.shape[-1], samples.dtype
        self._lengths.add(samples.shape[1])
        places = [self._place(samples.shape[1:]) for _ in range(len(samples))]
        self._expected += len(samples)
        if samples.device.type == "cpu":
            self._arrive()  # in the order of the calls
        self._coming = download(samples, functools.partial(self._keep, places, self._life))

    def _place(self, shape: Sequence[int]) -> Tensor | None:
        """Memory for the next sample; None if it goes to disk."""
        if not self._on_disk and self._budget.take(torch.Size(shape).numel() * self._dtype.itemsize):
            self._held.append(torch.empty(shape, dtype=self._dtype))
            return self._held[-1]
        self._on_disk += 1
        return None

    def _keep(self, places: Sequence[Tensor | None], life: object, samples: Tensor) -> None:
        """Put samples that are in the host's memory in their places, unless the spool was closed meanwhile."""
        if life is not self._life:
            return
        self._delivered += len(places)
        for place, sample in zip(places, samples, strict=True):
            if place is None:
                self._write(sample.contiguous())
            else:
                place.copy_(sample)

    def _arrive(self) -> None:
        """Wait for what is on its way."""
        if self._coming is not None and self._delivered < self._expected:
            self._coming.settle()

    def _write(self, sample: Tensor) -> None:
        raw = sample.reshape(-1).view(torch.uint8).numpy()
        offsets = pa.py_buffer(np.array([0, raw.nbytes], dtype=np.int64))
        column = pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(raw)])
        try:
            if self._writer is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._writer = pa.ipc.new_file(str(self._path), _SCHEMA)
            self._writer.write_batch(pa.record_batch([column], schema=_SCHEMA))
        except OSError as error:
            raise self._refusal(error) from None
        self._disk_bytes += raw.nbytes

    def _refusal(self, error: OSError) -> Refusal:
        return Refusal(
            f"{self._path}: cannot spool activations ({error.strerror or error}); free some disk, "
            "point --scratch at a larger one, raise --spool-memory, or use fewer --samples"
        )

    def __getitem__(self, index: int) -> Tensor:
        """Sample `index`, (length, channels)."""
        self._arrive()
        if index < len(self._held):
            return self._held[index]
        if self._reader is None:
            assert self._writer is not None
            try:
                self._writer.close()  # writes the footer, so the disk can be full here too
            except OSError as error:
                raise self._refusal(error) from None
            self._reader = pa.ipc.open_file(pa.OSFile(str(self._path), "rb"))
        first = len(self._held) + self._spilled
        record = index - first if index >= first else self._on_disk - self._spilled + index
        column = self._reader.get_batch(record).column(0)
        raw = np.frombuffer(column.buffers()[2], dtype=np.uint8)
        sample = torch.empty(raw.size // self._dtype.itemsize, dtype=self._dtype)  # aligned as those in memory are
        np.copyto(sample.view(torch.uint8).numpy(), raw)
        return sample.view(-1, self._channels)

    def spill(self) -> None:
        """Move what is held in memory to disk, once nothing more is appended and before anything is read."""
        if self._reader is not None or self._spilled:
            return
        self._arrive()
        held, self._held = self._held, []
        for sample in held:
            self._write(sample)
        self._on_disk += len(held)
        self._spilled = len(held)
        self._budget.give_back(sum(sample.nbytes for sample in held))

    def batch(self, indices: list[int], room: Room | None = None) -> Tensor:
        """Samples `indices` stacked: (n, length, channels); those of several lengths one after the other:
        (1, length of all, channels). In memory that `room` gives, if it is given."""
        samples = [self[index] for index in indices]
        if len({len(sample) for sample in samples}) > 1:
            tokens = sum(len(sample) for sample in samples)
            return torch.cat(samples, out=room((tokens, self._channels), self._dtype) if room else None)[None]
        return torch.stack(samples, out=room((len(samples), *samples[0].shape), self._dtype) if room else None)

    def close(self) -> None:
        self._life, self._coming, self._delivered, self._expected = object(), None, 0, 0
        self._budget.give_back(sum(sample.nbytes for sample in self._held))
        self._held = []
        for handle in (self._writer, self._reader):
            if handle is not None:
                with contextlib.suppress(OSError):
                    handle.close() if isinstance(handle, pa.ipc.RecordBatchFileWriter) else None
        self._writer = self._reader = None
        self._on_disk = self._spilled = self._disk_bytes = 0
        self._path.unlink(missing_ok=True)
