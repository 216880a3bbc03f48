"""A small LLaVA that has not learned anything yet: its config, and a processor for digits and pictures of one size."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from espalier.stages.data.characters import character_tokenizer
from espalier.stages.errors import Refusal

QUESTION = "?"
CHARACTERS = "0123456789." + QUESTION
IMAGE, END, PADDING = "<image>", "<end>", "<pad>"


def write_model(values: Mapping[str, Any], directory: Path) -> Path:
    """`directory` with config.json, tokenizer and processor of the LLaVA that `values` describe, without weights.

    `values` are a config.json's, but for what the vocabulary decides. Raises Refusal for another kind of model.
    """
    from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaProcessor

    values = dict(values)
    if (kind := values.pop("model_type", None)) != "llava":
        raise Refusal(f"model: model_type {kind!r} reads no pictures; write llava, or name a multimodal checkpoint")
    tokenizer = _tokenizer()
    decided = {
        "vocab_size": len(tokenizer),
        "use_cache": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    values["text_config"] = values.get("text_config", {}) | decided
    config = LlavaConfig(**values, image_token_index=tokenizer.convert_tokens_to_ids(IMAGE))
    vision: Any = config.vision_config
    side = vision.image_size
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        image_token=IMAGE,
    )
    config.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def _tokenizer() -> Any:
    """One token a character; beside them the picture's place, the end of the text, and padding."""
    tokenizer = character_tokenizer(CHARACTERS)
    tokenizer.add_special_tokens({"eos_token": END, "pad_token": PADDING, "extra_special_tokens": [IMAGE]})
    return tokenizer
