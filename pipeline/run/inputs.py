"""The samples of a run: windows of text, or images with captions, in tables in the run's own directory."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from espalier.cluster.shard_group import Stream
from espalier.pipeline.config.prune import PruneConfig
from espalier.pipeline.config.retrain import RetrainConfig
from espalier.pipeline.planning.model_info import ModelInfo
from espalier.stages.data.captions import holds_images
from espalier.stages.data.image_samples import load_processor
from espalier.stages.data.image_table import ImageTable, build_image_table
from espalier.stages.data.pixel_table import build_pixel_table
from espalier.stages.data.token_table import TokenTable, build_token_table
from espalier.stages.errors import Refusal, first_line
from espalier.stages.loading.skeleton import Skeleton, read_config
from espalier.stages.loading.vision import VisionSkeleton
from espalier.stages.model.families import sees_images
from espalier.stages.storage.config_file import stated_config
from espalier.stages.storage.hf_checkpoint import resolve
from espalier.stages.text.corpus import holds_ids
from espalier.stages.text.openings import Bos

LOST_WITHOUT_BOS = ("gemma",)  # how the names of families begin
Purpose = Literal["calibration", "evaluation", "training"]


def image_file(home: Path) -> Path:
    """Where a run keeps the images it calibrates on, until it is finished: unlike tokens, pixels take room."""
    return home / "images-calibration.arrow"


def check_calibration(config: PruneConfig, facts: ModelInfo) -> None:
    """Raises Refusal for images that the model does not see."""
    if holds_images(config.calibration) and not sees_images(facts.family):
        raise Refusal(
            f"calibration {config.calibration}: a folder of images, and {config.model} ({facts.family}) reads text "
            "only; give text, or a model that sees"
        )


def image_table(config: PruneConfig, length: int, home: Path) -> ImageTable | None:
    """The images to calibrate on, the same again when the run is resumed; None where it is text.

    Raises Refusal for text that is to calibrate a vision tower.
    """
    if image_file(home).exists():
        return ImageTable.open(image_file(home))
    source = config.calibration
    if not isinstance(source, str) or not holds_images(source):
        if config.tower == "language":
            return None
        given = source if isinstance(source, str) else "a list"
        raise Refusal(f"calibration {given} with tower vision: no folder of images, and it sees no text; give one")
    model = resolve(config.model)
    settings = read_config(model, config.trust_remote_code)
    processor = load_processor(model, config.trust_remote_code)
    wanted: dict[str, Any] = {"length": length, "samples": config.samples, "seed": config.seed}
    if config.tower == "vision":
        return build_pixel_table(
            source, processor, VisionSkeleton(settings, torch.float32), path=image_file(home), **wanted
        )
    return build_image_table(source, processor, Skeleton(settings, torch.float32), path=image_file(home), **wanted)


def token_table(
    purpose: Purpose,
    source: Any,
    config: PruneConfig | RetrainConfig,
    facts: ModelInfo,
    length: int,
    home: Path,
    samples: int | None = None,
) -> TokenTable:
    """Windows of `source` for that purpose, the same again when the run is resumed; `samples` of them, or all."""
    reads = isinstance(source, str) or (source and isinstance(source[0], str))
    return kept_table(
        home / f"tokens-{purpose}.arrow",
        source,
        partial(_tokenizer_for, source, config) if reads else lambda: None,
        length=length,
        samples=samples,
        seed=config.seed,
        vocab_size=facts.vocabulary,
        purpose=purpose,
        bos=bos_for(config.bos, facts.family),
        text_column=config.text_column,
        column_required=purpose != "evaluation",  # which may well be another kind of file
    )


def _tokenizer_for(source: Any, config: PruneConfig | RetrainConfig) -> Any:
    """The model's tokenizer, or None where it has none and the source is one of ids. Raises Refusal."""
    try:
        return load_tokenizer(config.model, config.trust_remote_code)
    except Refusal:
        if isinstance(source, str) and holds_ids(source, config.text_column):
            return None
        raise


def bos_for(bos: Bos, family: str) -> Bos:
    """`bos`, but that auto is window for a model that is lost in a window without one."""
    return "window" if bos == "auto" and family.startswith(LOST_WITHOUT_BOS) else bos


def tell(table: TokenTable, note: Callable[[str], None], warn: Callable[[str], None] | None = None) -> None:
    """What was read and how, and what seemed odd about it."""
    if table.read:
        note(table.read)
    for warning in table.warnings:
        warn(warning) if warn else note(f"warning: {warning}")


def kept_table(path: Path, source: Any, tokenizer: Callable[[], Any], **options: Any) -> TokenTable:
    """The token table in `path`, built there first if there is none, by the tokenizer that is then called for.

    `options`: those of `build_token_table`.
    """
    if path.exists():
        return TokenTable.open(path)
    return build_token_table(source, tokenizer(), path=path, **options)


def stream_of(table: TokenTable | ImageTable, microbatch: int, in_flight: int) -> Stream:
    """The whole table, so many windows at a time."""
    return Stream(
        batches=lambda number: table.rows(number * microbatch, min((number + 1) * microbatch, len(table))),
        microbatches=math.ceil(len(table) / microbatch),
        in_flight=in_flight,
        varying=(table.varying or None) if isinstance(table, ImageTable) else None,
    )


def load_tokenizer(model: str, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer. Raises Refusal if it has none that can be read."""
    from transformers import AutoTokenizer

    directory = resolve(model)
    stated = stated_config(directory, trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code, **stated)
    except Exception as error:
        why = first_line(error)
        raise Refusal(f"{model}: its tokenizer cannot be read ({why}); give token ids instead of text") from None
