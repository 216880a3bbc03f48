"""The data of a tracking experiment, training and evaluation: one function for each kind, see `Prepare`.

Another kind is one more such function, and one more line in `espalier.pipeline.config.track.DATA_KINDS`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from espalier.pipeline.config.track import DATA_KINDS, TrackConfig
from espalier.pipeline.retraining.run import Sources
from espalier.pipeline.run.inputs import bos_for, kept_table, load_tokenizer
from espalier.stages.data.characters import character_tokenizer, split_text
from espalier.stages.data.training_batches import SourceSpec
from espalier.stages.errors import Refusal
from espalier.stages.loading.skeleton import read_config
from espalier.stages.storage.hf_checkpoint import resolve
from espalier.stages.text.openings import opening_of

Curve = Sequence[tuple[float, float]]  # (sparsity, metric)
Measure = Callable[[Path], Mapping[str, float]]  # a checkpoint's directory -> figures of it


@dataclass(frozen=True, kw_only=True, slots=True)
class ExperimentData:
    """What a kind of data gives.

    `metric` is what the curve shows: "loss", the mean over the evaluated tokens, or one of the figures of `measure`.
    """

    model: str  # directory: a checkpoint; or a config.json, with what reads the data, to begin from random weights
    sources: Sources
    epoch: int  # windows, or examples, in one pass over what is trained on
    calibration: list[list[int]]  # a window for `prune`, whose temporal criterion does not look at it
    evaluation: str | None = None  # text that `prune` measures the same loss on, before there is any fine-tuning
    metric: str = "loss"
    unit: str = "nats a token"
    measure: Measure | None = None
    beside: Mapping[str, Curve] = field(default_factory=dict)  # curves to show beside this one, such as a plain guess


class Prepare(Protocol):
    def __call__(self, config: TrackConfig, home: Path) -> ExperimentData:
        """Write to `home`, which may hold what an interrupted call wrote, whatever is needed, and say what it is.

        Raises Refusal for data that cannot be read.
        """


def prepare(config: TrackConfig, home: Path) -> ExperimentData:
    """The material of `config.data`, read as its kind says."""
    module, _, name = DATA_KINDS[config.data_kind].partition(":")
    function: Prepare = getattr(import_module(module), name)
    return function(config, home)


def characters(config: TrackConfig, home: Path) -> ExperimentData:
    """A text file, its characters the tokens. A model that begins from random weights has as many as there are."""
    training, evaluation = split_text(Path(config.data), config.held_out)
    if isinstance(config.model, str):
        return _text_material(config, home, config.model, load_tokenizer(config.model), training, evaluation)
    tokenizer = character_tokenizer(training + evaluation)
    model = write_config(config.model | {"vocab_size": len(tokenizer)}, home / "begin")
    tokenizer.save_pretrained(model)
    return _text_material(config, home, str(model), tokenizer, training, evaluation)


def text(config: TrackConfig, home: Path) -> ExperimentData:
    """A text file, read by the tokenizer of the checkpoint that training goes on from."""
    if not isinstance(config.model, str):
        raise Refusal("data-kind text: the recipe's model has no tokenizer; name a checkpoint, or use characters")
    training, evaluation = split_text(Path(config.data), config.held_out)
    return _text_material(config, home, config.model, load_tokenizer(config.model), training, evaluation)


def _text_material(
    config: TrackConfig, home: Path, model: str, tokenizer: Any, training: str, evaluation: str
) -> ExperimentData:
    settings = read_config(resolve(model))
    bos = bos_for(config.bos, settings.model_type)
    # Training windows begin anywhere: those with a BOS at their head are given it as they are cut.
    head = opening_of(tokenizer, bos, f"training text {config.data}").ids.tolist() if bos == "window" else []
    tables = [
        kept_table(
            home / f"tokens-{purpose}.arrow",
            [part],
            lambda: tokenizer,
            length=config.length,
            samples=None,
            seed=config.seed,
            vocab_size=settings.get_text_config().vocab_size,
            purpose=purpose,
            bos=marked,
        )
        for part, purpose, marked in ((training, "training", "none" if head else bos), (evaluation, "evaluation", bos))
    ]
    learned, held_out = tables
    file = home / "evaluation.txt"
    file.write_bytes(evaluation.encode())
    sliding = SourceSpec(
        factory="espalier.stages.data.characters:SlidingWindows",
        options={"path": str(learned.path), "length": config.length, "head": head},
    )
    windows = SourceSpec(
        factory="espalier.stages.data.training_batches:TokenWindows", options={"path": str(held_out.path)}
    )
    return ExperimentData(
        model=model,
        sources=Sources(data=sliding, eval=windows),
        epoch=len(learned),
        calibration=held_out.rows(0, 1).tolist(),
        evaluation=str(file),
    )


def write_config(values: Mapping[str, Any], directory: Path) -> Path:
    """A directory with that config.json, complete: from it a model begins at random.

    Tokens that begin or end a text, which no text here has, are none. Raises Refusal for a model type that
    transformers does not have.
    """
    from transformers import AutoConfig

    values = {"bos_token_id": None, "eos_token_id": None, "use_cache": False} | dict(values)
    model_type = values.pop("model_type", None)
    try:
        config = AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError) as error:
        first = " ".join(str(error).split())[:120]
        raise Refusal(f"model: model_type {model_type!r} and its settings make no model ({first})") from None
    config.save_pretrained(directory)
    return directory
