"""The configuration of `espalier retrain`: the same names as flags, in YAML and in Python."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from espalier.pipeline.config.options import COLUMN_HELP, Before, Count, Panel
from espalier.pipeline.config.training import TrainingConfig
from espalier.stages.errors import Refusal
from espalier.stages.shadow.spec import ShadowSpec

LENGTHS = ("steps", "epochs", "tokens")  # ways to say how long to train


class RetrainConfig(TrainingConfig):
    """Everything that decides a training run. Each field is also a flag of `espalier retrain` and a key of its YAML."""

    model: str = Field(
        description="Checkpoint directory (safetensors) or hub id; or a directory with only config.json and a "
        "tokenizer, which begins from random weights."
    )
    output: str = Field(description="Directory for the trained checkpoint; must be new or empty.")
    data: str | list[str] | list[list[int]] = Field(
        description="Text to train on: text file, JSONL, CSV, Parquet, a folder of those, or hub data set."
    )
    eval: Annotated[str | list[str] | list[list[int]] | None, Panel.TEXT, Before("length")] = Field(
        None, description="Text to measure the loss on; same forms."
    )
    masked: Annotated[bool, Panel.MASKS] = Field(False, description="Keep a pruned model's zeros exactly zero.")
    mask: Annotated[str | None, Panel.MASKS] = Field(
        None,
        description="A pruned checkpoint of the same model: its zeros become this model's, and stay.",
    )
    epochs: Annotated[float | None, Panel.TRAINING, Before("batch")] = Field(
        None, gt=0, description="Passes over the data; default: 1, without steps and tokens."
    )
    tokens: Annotated[Count | None, Panel.TRAINING, Before("batch")] = Field(
        None, description="Tokens to train on, rounded up to whole steps."
    )
    text_column: Annotated[str | None, Panel.TEXT, Before("seed")] = Field(None, description=COLUMN_HELP)
    shadow: Annotated[bool, Panel.SHADOW, Before("shadow_schedule")] = Field(
        False, description="Average the weights on the way; OUTPUT/shadow is for `temporal`."
    )
    shadow_rounding: Annotated[Literal["stochastic", "compensated"], Panel.SHADOW, Before("shadow_every")] = Field(
        "stochastic", description="Of bf16 averages."
    )
    activation_checkpointing: Annotated[bool, Before("dtype")] = Field(
        False, description="Keep each block's input alone and compute the rest again on the way back: a third slower."
    )
    trust_remote_code: bool = Field(False, description="Let the checkpoint's own Python code run.")
    parent_run: Annotated[str | None, Panel.RECORD] = Field(None, description="MLflow run that this one is part of.")

    @model_validator(mode="after")
    def _together(self) -> "RetrainConfig":
        """What fits each by itself and not all together."""
        given = [name for name in LENGTHS if getattr(self, name) is not None]
        if len(given) > 1:
            raise Refusal(f"{given[0]} {getattr(self, given[0])} and {given[1]} {getattr(self, given[1])}: give one")
        if self.offload and self.zero_stage < 2:
            raise Refusal(f"offload with zero-stage {self.zero_stage}: needs stage 2 or 3; add --zero-stage 2")
        self.shadow_spec  # noqa: B018 refuses what cannot be averaged
        return self

    @property
    def shadow_spec(self) -> ShadowSpec | None:
        """How weights are averaged; None where they are not."""
        if not self.shadow:
            return None
        return ShadowSpec(**{field.name: getattr(self, f"shadow_{field.name}") for field in fields(ShadowSpec)})

    @property
    def holds_zeros(self) -> bool:
        return self.masked or self.mask is not None

    @property
    def recipe_name(self) -> str:
        """Such as `zero 3 + offload masked`."""
        parts = [f"zero {self.zero_stage}", *(["+ offload"] if self.offload else [])]
        return " ".join([*parts, *(["masked"] if self.holds_zeros else [])])

    def name(self) -> str:
        """Of the run in MLflow."""
        return self.run_name or f"{Path(self.model).name} {self.recipe_name}"
