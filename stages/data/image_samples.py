"""An image and its caption -> a model's own inputs, by its checkpoint's own processor."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoProcessor

from espalier.stages.data.captions import Pair, open_image
from espalier.stages.errors import Refusal
from espalier.stages.storage.config_file import stated_config

BY_TOKEN = ("mm_token_type_ids", "token_type_ids")  # of a processor's outputs: one entry a token, zero for text


class Shapes(Protocol):
    """What is asked of a model: its configuration, and what of a sample's inputs shapes the calls of its blocks."""

    config: Any
    vocabulary: int

    def varying(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


def load_processor(directory: Path, trust_remote_code: bool = False) -> Any:
    """The checkpoint's own processor of images and text. Raises Refusal if it has none that can be read."""

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
