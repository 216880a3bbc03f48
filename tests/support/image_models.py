"""Processors for the tiny checkpoints that see, and rendered images with captions, for the tests."""

import json
import random
from pathlib import Path
from typing import Any

import transformers
from family_models import random_model
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from torch import dtype as Dtype

SEEING = ("llava", "qwen2_vl", "gemma3")
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
SPECIAL = {
    "llava": {"<image>": 127},
    "qwen2_vl": {"<|image_pad|>": 127, "<|video_pad|>": 126, "<|vision_start|>": 125, "<|vision_end|>": 124},
    "gemma3": {"<image>": 127, "<boi>": 126, "<eoi>": 125},
}


def tokenizer_of(name: str) -> Any:
    """A character's id is its ASCII code; the highest ids are the family's image tokens."""
    special = SPECIAL[name]
    tokenizer = Tokenizer(BPE(vocab={chr(code): code for code in range(124)} | special, merges=[]))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    roles = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"} if name == "gemma3" else {}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=chr(2), extra_special_tokens=roles or None
    )


def add_processor(directory: Path, name: str) -> None:
    """What the family's AutoProcessor reads, beside a tiny checkpoint."""
    tokenizer = tokenizer_of(name)
    size = {"height": 16, "width": 16}
    if name == "llava":
        images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size)
        layout = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        transformers.LlavaProcessor(images, tokenizer, **layout).save_pretrained(directory)
        return
    if name == "gemma3":
        images = transformers.Gemma3ImageProcessorPil(size=size)
        transformers.Gemma3Processor(images, tokenizer, image_seq_length=4).save_pretrained(directory)
        return
    grid = {"patch_size": 8, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 2048}}
    transformers.Qwen2VLImageProcessorPil(**grid).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    settings = json.loads((directory / "preprocessor_config.json").read_text())
    (directory / "preprocessor_config.json").write_text(json.dumps(settings | {"processor_class": "Qwen2VLProcessor"}))
    (directory / "chat_template.jinja").write_text(TEMPLATE)


def seeing_checkpoint(directory: Path, name: str, dtype: Dtype) -> Path:
    """A tiny random checkpoint of the family with its processor."""
    random_model(name, dtype).save_pretrained(directory)
    add_processor(directory, name)
    return directory


def image_folder(folder: Path, images: int, words: int, seed: int = 0) -> Path:
    """Rendered images of several shapes, and captions of about so many words."""
    source = random.Random(seed)
    folder.mkdir(parents=True)
    lines = []
    for number in range(images):
        width, height = ((32, 32), (48, 32), (32, 64), (64, 32))[number % 4]  # each another grid
        image = Image.new("RGB", (width, height), tuple(source.randrange(256) for _ in range(3)))
        pen = ImageDraw.Draw(image)
        for _ in range(3):
            corner = (source.randrange(width // 2), source.randrange(height // 2))
            opposite = (corner[0] + source.randrange(4, 16), corner[1] + source.randrange(4, 16))
            pen.rectangle((*corner, *opposite), fill=tuple(source.randrange(256) for _ in range(3)))
        name = f"{number:03d}.{('png', 'jpg', 'webp')[number % 3]}"
        image.save(folder / name)
        text = " ".join("".join(source.choices("etaoinshrdlu", k=source.randint(2, 8))) for _ in range(words))
        lines.append(json.dumps({"file": name, "text": text}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return folder
