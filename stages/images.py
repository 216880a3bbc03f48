"""A folder of images with captions -> one memory-mapped Arrow file of a model's own inputs, to calibrate on.

What a model takes is made by its checkpoint's own processor: pixels, and a prompt in which the image stands before its
caption. Every sample has exactly `length` tokens, so that samples stream like windows of text.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from stages.captions import Pair, open_image, read_pairs
from stages.config_file import stated_config
from stages.errors import Refusal
from stages.files import is_full, replacing
from stages.skeleton import VARYING
from stages.varying import BY_SAMPLE

BY_TOKEN = ("mm_token_type_ids", "token_type_ids")  # of a processor's outputs: one entry a token, zero for text


class Shapes(Protocol):
    """What is asked of a model: its configuration, and what of a sample's inputs shapes the calls of its blocks."""

    config: Any
    vocabulary: int

    def varying(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


def load_processor(directory: Path, trust_remote_code: bool = False) -> Any:
    """The checkpoint's own processor of images and text. Raises Refusal if it has none that can be read."""
    from transformers import AutoProcessor

    stated = stated_config(directory, trust_remote_code)
    try:
        try:
            processor = AutoProcessor.from_pretrained(directory, trust_remote_code=trust_remote_code, **stated)
        except ImportError as error:
            if "orchvision" not in str(error):
                raise
            processor = _without_video(directory, trust_remote_code, **stated)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise Refusal(
            f"{directory}: its image processor cannot be read ({lines[0]}); put the original checkpoint's "
            "preprocessor_config.json and tokenizer files there, or calibrate on text"
        ) from None
    if not hasattr(processor, "image_processor"):  # AutoProcessor settles for a tokenizer
        raise Refusal(
            f"{directory}: no image processor in it; put the original checkpoint's preprocessor_config.json there, "
            "or calibrate on text"
        )
    return processor


def _without_video(directory: Path, trust_remote_code: bool, **stated: Any) -> Any:
    """The processor without its part for videos, which alone needs torchvision."""
    import transformers

    names = [
        json.loads((directory / file).read_text()).get("processor_class")
        for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
        if (directory / file).is_file()
    ]
    kind = getattr(transformers, next(name for name in names if name))

    class ImagesOnly(kind):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(name, argument)

    stated["trust_remote_code"] = trust_remote_code
    images = transformers.AutoImageProcessor.from_pretrained(directory, **stated)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **stated)
    return ImagesOnly(images, tokenizer, None, chat_template=tokenizer.chat_template)


# --- samples ----------------------------------------------------------------------------------------------------------


class Sampler:
    """Makes a pair into a model's inputs of exactly `length` tokens.

    The prompt is the chat template's for a user who shows the image and says its caption (without a template: the image
    token, a line break, the caption). What is too long is cut; what is too short goes on with the captions of the
    following pairs, the end-of-text id between them.
    """

    def __init__(self, pairs: Sequence[Pair], processor: Any, model: Shapes, length: int) -> None:
        self._pairs, self._processor, self._model, self._length = pairs, processor, model, length
        self._image_id = int(model.config.image_token_id)

    def sample(self, index: int) -> dict[str, np.ndarray]:
        """Name -> what the model takes under it, for one sample: input_ids (1, length), pixel_values, ..."""
        pair = self._pairs[index]
        given = self._processor(
            images=[open_image(pair.path)], text=[self._prompt(pair)], return_tensors="pt", **self._special
        )
        inputs = {name: value for name, value in given.items() if name != "attention_mask"}
        ids = inputs["input_ids"][0]
        places = (ids == self._image_id).nonzero()
        if not len(places):
            raise Refusal(
                f"calibration {pair.path}: the processor left no place for it in the prompt; see its template"
            )
        taken = int(places[-1]) + 1
        if taken > self._length:
            raise Refusal(
                f"calibration {pair.path}: the image and what stands before it take {taken} tokens, more than length "
                f"{self._length}; give --length {taken} or more, or smaller images"
            )
        inputs["input_ids"] = self._filled(ids, index)[None]
        for name in BY_TOKEN:
            if name in inputs:
                values = inputs[name][:, : self._length]
                inputs[name] = torch.nn.functional.pad(values, (0, self._length - values.shape[1]))
        self._check(inputs["input_ids"], pair)
        varying = self._model.varying(inputs)
        kept = {name: value for name, value in inputs.items() if name not in BY_TOKEN} | varying
        return {name: plain(value) for name, value in kept.items()}

    @property
    def _special(self) -> dict[str, bool]:
        """A template writes the begin-of-text token itself, as a rule."""
        templated = getattr(self._processor, "chat_template", None) is not None
        bos = getattr(self._processor.tokenizer, "bos_token", None)
        return {"add_special_tokens": False} if templated and bos and bos in self._processor.chat_template else {}

    def _prompt(self, pair: Pair) -> str:
        token = self._processor.image_token
        if token in pair.text:
            raise Refusal(f"calibration {pair.path}: its caption holds {token}, which stands for an image")
        if getattr(self._processor, "chat_template", None) is None:
            return f"{token}\n{pair.text}"
        content = [{"type": "image"}, {"type": "text", "text": pair.text}]
        return self._processor.apply_chat_template([{"role": "user", "content": content}])

    def _filled(self, ids: Tensor, index: int) -> Tensor:
        tokenizer = self._processor.tokenizer
        parts, held = [ids], len(ids)
        while held < self._length:
            index = (index + 1) % len(self._pairs)
            more = tokenizer(self._pairs[index].text, add_special_tokens=False)["input_ids"]
            if tokenizer.eos_token_id is not None:
                more = [tokenizer.eos_token_id, *more]
            if not more:
                raise Refusal(f"calibration {self._pairs[index].path}: its caption has no tokens; give it a longer one")
            parts.append(torch.tensor(more, dtype=ids.dtype))
            held += len(more)
        return torch.cat(parts)[: self._length]

    def _check(self, ids: Tensor, pair: Pair) -> None:
        wrong = ids[(ids < 0) | (ids >= self._model.vocabulary)]
        if len(wrong):
            raise Refusal(
                f"calibration {pair.path}: token id {int(wrong[0])} is beyond the model's vocabulary of "
                f"{self._model.vocabulary}; this processor and this model do not belong together"
            )


def plain(value: Tensor) -> np.ndarray:
    """What is kept on disk: float32 as it is, integers as int32."""
    array = np.ascontiguousarray(value.numpy())
    return array.astype(np.int32) if array.dtype.kind in "iu" else array


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
