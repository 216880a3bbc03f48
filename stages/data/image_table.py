"""A folder of images with captions -> one memory-mapped Arrow file of a model's own inputs, to calibrate on.

What a model takes is made by its checkpoint's own processor: pixels, and a prompt in which the image stands before its
caption. Every sample has exactly `length` tokens, so that samples stream like windows of text.
"""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from espalier.stages.data.captions import Pair, read_pairs
from espalier.stages.data.image_samples import Sampler, Shapes
from espalier.stages.errors import Refusal
from espalier.stages.loading.skeleton import VARYING
from espalier.stages.model.calls import BY_SAMPLE
from espalier.stages.storage.files import is_full, replacing

# --- samples ----------------------------------------------------------------------------------------------------------


# --- the table --------------------------------------------------------------------------------------------------------


class ImageTable:
    """A finished table of a model's inputs: a read-only memory map, one record a sample."""

    def __init__(self, path: Path, reader: pa.ipc.RecordBatchFileReader) -> None:
        metadata = {key.decode(): value.decode() for key, value in (reader.schema.metadata or {}).items()}
        self.path, self._reader = path, reader
        self.length = int(metadata["length"])
        self.source = metadata["source"]
        self._dtypes: dict[str, str] = json.loads(metadata["inputs"])

    @classmethod
    def open(cls, path: Path) -> "ImageTable":
        """The table in the file at `path`. Raises Refusal if it is not a whole one."""
        try:
            return cls(Path(path), pa.ipc.open_file(pa.memory_map(str(path), "r")))
        except (pa.ArrowException, KeyError, ValueError, OSError) as error:
            raise Refusal(f"image table {path}: not whole ({error}); delete it and start again") from error

    def __len__(self) -> int:
        return self._reader.num_record_batches

    def sample(self, index: int) -> dict[str, np.ndarray]:
        """Name -> one sample's inputs, views of the file."""
        batch = self._reader.get_batch(index)
        return {
            name: np.frombuffer(batch.column(name)[0].as_buffer(), dtype=dtype).reshape(
                batch.column(f"{name}.shape")[0].as_py()
            )
            for name, dtype in self._dtypes.items()
        }

    def rows(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """What the model takes of samples start to stop - 1 together."""
        samples = [self.sample(index) for index in range(start, min(stop, len(self)))]
        return {name: np.concatenate([sample[name] for sample in samples]) for name in self._dtypes}

    @property
    def varying(self) -> dict[str, np.ndarray]:
        """Of all samples, those inputs that shape how blocks are called: name -> (samples, ..., length)."""
        names = [name for name in (VARYING if "input_ids" in self._dtypes else BY_SAMPLE) if name in self._dtypes]
        samples = [{name: self.sample(index)[name] for name in names} for index in range(len(self) if names else 0)]
        return {name: np.concatenate([sample[name] for sample in samples]) for name in names}


def build_image_table(
    source: str | Path, processor: Any, model: Shapes, *, length: int, samples: int, seed: int, path: Path
) -> ImageTable:
    """The table of `samples` images of the folder `source`, each with `length` tokens, written in one step.

    Which, where there are more, is decided by a permutation seeded with `seed`; they stay in the folder's order.
    Raises Refusal for a folder, a caption or an image that will not do.
    """
    pairs = read_pairs(Path(source))
    chosen = choose(len(pairs), samples, seed, f"calibration {source}: {len(pairs)} images with captions")
    sampler = Sampler(pairs, processor, model, length)
    return write_table(path, ((pairs[index], sampler.sample(index)) for index in chosen), length, str(source))


def choose(there: int, wanted: int, seed: int, what: str) -> np.ndarray:
    """The numbers of so many of the images that are `there`, in order. Raises Refusal, beginning with `what`, for too
    few."""
    if there < wanted:
        raise Refusal(f"{what}, fewer than the {wanted} samples asked for; give more, or --samples {max(there, 1)}")
    return np.sort(np.random.default_rng(seed).permutation(there)[:wanted])


def write_table(
    path: Path, samples: Iterator[tuple[Pair, dict[str, np.ndarray]]], length: int, source: str
) -> ImageTable:
    """The table of those inputs, each with the image that it was made of, written in one step.

    Raises Refusal when the disk is full, and for an image unlike those before it where they must be of one size.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            _write(file, samples, length, source)
    except OSError as error:
        if is_full(error):
            raise Refusal(f"{path}: the disk is full; free some space or put the output elsewhere") from error
        raise
    return ImageTable.open(path)


def _write(file: IO[bytes], samples: Iterator[tuple[Pair, dict[str, np.ndarray]]], length: int, source: str) -> None:
    """Writes sample after sample, so that one is in memory at a time."""
    opening, first = next(samples)
    fields = [pa.field(name, pa.large_binary()) for name in first]
    fields += [pa.field(f"{name}.shape", pa.list_(pa.int64())) for name in first]
    dtypes = {name: values.dtype.str for name, values in first.items()}
    metadata = {"length": str(length), "source": source, "inputs": json.dumps(dtypes)}
    schema = pa.schema(fields, metadata=metadata)
    with pa.ipc.new_file(file, schema) as writer:
        for pair, sample in chain([(opening, first)], samples):
            for name, values in sample.items():
                if values.shape[1:] != first[name].shape[1:]:
                    raise Refusal(
                        f"calibration {pair.path}: its {name} are {values.shape[1:]}, those of the images before it "
                        f"{first[name].shape[1:]}; this model needs images of one size"
                    )
            columns = [pa.array([values.tobytes()], pa.large_binary()) for values in sample.values()]
            columns += [pa.array([list(values.shape)], pa.list_(pa.int64())) for values in sample.values()]
            writer.write_batch(pa.record_batch(columns, schema=schema))
