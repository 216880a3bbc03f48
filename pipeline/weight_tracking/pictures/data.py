"""The data of `espalier track` for pictures of quantities: a `Prepare` of espalier.pipeline.weight_tracking.data.

The pictures are a folder with a CSV (file,quantity,unit), or, for `data: rendered`, product labels made here. The model
is a small one that begins at random, or a multimodal checkpoint.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from espalier.pipeline.config.track import TrackConfig
from espalier.pipeline.retraining.run import Sources
from espalier.pipeline.weight_tracking.data import ExperimentData
from espalier.pipeline.weight_tracking.pictures.model import QUESTION, write_model
from espalier.pipeline.weight_tracking.pictures.render import render
from espalier.stages.data.labelled_images import Pictures
from espalier.stages.data.training_batches import SourceSpec
from espalier.stages.errors import Refusal, unknown
from espalier.stages.metrics.number_reading import constant_guess, rate_reading, read_numbers
from espalier.stages.storage.hf_checkpoint import resolve
from espalier.stages.training.model import load_model

RENDERED = "rendered"
OPTIONS = ("pictures", "side", "question")
METRIC = "mean absolute error"
ASKED = "What quantity is on this label? Answer with the number alone."


def pictures(config: TrackConfig, home: Path) -> ExperimentData:
    """The pictures: the first to train on, the last `held_out` of them to be read."""
    if strange := sorted(config.data_options.keys() - set(OPTIONS)):
        raise Refusal(f"data-option {strange[0]!r} {unknown(strange[0], OPTIONS, 'pictures take')}")
    if config.bos != "auto":
        raise Refusal(f"bos {config.bos}: pictures are no text that could begin with one; leave --bos out")
    checkpoint = config.model if isinstance(config.model, str) else None
    model = write_model(config.model, home / "begin") if isinstance(config.model, dict) else resolve(config.model)
    options: dict[str, Any] = {
        "folder": str(_folder(config, home)),
        "processor": str(model),
        "question": config.data_options.get("question", ASKED if checkpoint else QUESTION),
    }
    everything = Pictures(**options)
    cut = round(len(everything) * (1 - config.held_out))
    if not 0 < cut < len(everything):
        raise Refusal(
            f"data {options['folder']}: {len(everything)} pictures, too few to hold {config.held_out:.0%} of them out; "
            "add some"
        )
    true = [label.quantity for label in everything.labels]
    guess = constant_guess(true[:cut], true[cut:])
    digits = everything.tokenizer("0123456789", add_special_tokens=False)["input_ids"]

    def measure(checkpoint: Path) -> Mapping[str, float]:
        return _read(checkpoint, Pictures(**options, first=cut), config.seed)

    return ExperimentData(
        model=str(model),
        sources=Sources(data=_source(options | {"last": cut}), eval=_source(options | {"first": cut})),
        epoch=cut,
        calibration=[(digits * -(-config.length // len(digits)))[: config.length]],
        metric=METRIC,
        unit="in the labels' own units",
        measure=measure,
        beside={"always the median": [(share, guess.error) for share in config.sparsities or (0.0, 1.0)]},
    )


def _folder(config: TrackConfig, home: Path) -> Path:
    """Where the pictures are, rendered first if that is what is wanted."""
    if config.data != RENDERED:
        return Path(config.data)
    count, side = (_whole(config.data_options, name, least) for name, least in (("pictures", 2), ("side", 16)))
    return render(home / "pictures", count, side, config.seed)


def _whole(options: Mapping[str, Any], name: str, least: int) -> int:
    try:
        value = int(options[name])
    except (KeyError, ValueError):
        value = -1
    if value < least:
        raise Refusal(f"data-option {name} {options.get(name)}: must be a whole number of {least} or more")
    return value


def _source(options: Mapping[str, Any]) -> SourceSpec:
    return SourceSpec(factory="espalier.stages.data.labelled_images:Pictures", options=dict(options))


def _read(checkpoint: Path, held_out: Pictures, seed: int) -> dict[str, float]:
    """How well the model in `checkpoint` reads what was held out."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: Any = load_model(checkpoint, dtype, seed)
    model.to(device).eval()
    reading = rate_reading(read_numbers(model, held_out), [label.quantity for label in held_out.labels])
    return {METRIC: reading.error, "read exactly": reading.exact}
