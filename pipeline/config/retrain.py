"""The configuration of `espalier retrain`: the same names as flags, in YAML and in Python."""

from dataclasses import fields
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from espalier.pipeline.config.options import BOS_HELP, COLUMN_HELP, Count, Length
from espalier.stages.errors import Refusal
from espalier.stages.shadow.spec import ShadowSpec
from espalier.stages.text.openings import Bos

LENGTHS = ("steps", "epochs", "tokens")  # ways to say how long to train


class RetrainConfig(BaseModel):
    """Everything that decides a training run. Each field is also a flag of `espalier retrain` and a key of its YAML."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        description="Checkpoint directory (safetensors) or hub id; or a directory with only config.json and a "
        "tokenizer, which begins from random weights."
    )
    output: str = Field(description="Directory for the trained checkpoint; must be new or empty.")
    data: str | list[str] | list[list[int]] = Field(
        description="Text to train on: text file, JSONL, CSV, Parquet, a folder of those, or hub data set."
    )
    eval: str | list[str] | list[list[int]] | None = Field(None, description="Text to measure the loss on; same forms.")
    masked: bool = Field(False, description="Keep a pruned model's zeros exactly zero.")
    mask: str | None = Field(
        None,
        description="A pruned checkpoint of the same model: its zeros become this model's, and stay.",
    )
    steps: Count | None = Field(None, description="Optimizer steps.")
    epochs: float | None = Field(None, gt=0, description="Passes over the data; default: 1, without steps and tokens.")
    tokens: Count | None = Field(None, description="Tokens to train on, rounded up to whole steps.")
    batch: Count = Field(32, description="Windows in an optimizer step, over all ranks.")
    microbatch: Count | Literal["auto"] = Field(
        "auto", description="Windows in a forward pass on one rank; auto: about 8192 tokens that divide the batch."
    )
    length: Length = Field(
        "auto", description="Tokens in a window; auto: 2048, or the model's context if that is shorter."
    )
    bos: Bos = Field("auto", description=BOS_HELP)
    text_column: str | None = Field(None, description=COLUMN_HELP)
    learning_rate: float = Field(1e-4, gt=0, description="Peak, of Adam with decoupled decay.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How the learning rate falls, to a tenth of the peak, or that it does not."
    )
    warmup: int = Field(0, ge=0, description="Steps over which the learning rate climbs.")
    weight_decay: float = Field(0.0, ge=0, description="Of matrices; biases and norm gains do not decay.")
    beta2: float = Field(0.999, gt=0, lt=1, description="Adam's decay of squared gradients; the other is 0.9.")
    clip: float = Field(1.0, ge=0, description="Largest norm of the gradient; 0: as it is.")
    seed: int = Field(0, ge=0, description="Seed of everything random.")
    shadow: bool = Field(False, description="Average the weights on the way; OUTPUT/shadow is for `temporal`.")
    shadow_schedule: Literal["linear", "exponential", "uniform"] = Field(
        "linear", description="How later snapshots weigh more than earlier ones, or that they do not."
    )
    shadow_decay: float = Field(0.99, description="Of exponential: a snapshot's weight beside the next.")
    shadow_signed: bool = Field(True, description="Average weights; otherwise their magnitudes.")
    shadow_window: Count | None = Field(None, description="Count only so many last snapshots; default: all.")
    shadow_dtype: Literal["fp32", "bf16", "int8"] = Field("fp32", description="What averages are kept in.")
    shadow_rounding: Literal["stochastic", "compensated"] = Field("stochastic", description="Of bf16 averages.")
    shadow_every: Count = Field(10, description="Optimizer steps between snapshots.")
    zero_stage: int = Field(
        1, description="What ZeRO partitions: 1 optimizer state, 2 and gradients, 3 and parameters; 0: nothing."
    )
    ranks: Count | Literal["auto"] = Field("auto", description="Processes to train on; auto: one a GPU, or one a core.")
    offload: bool = Field(False, description="Keep optimizer state in CPU memory and step there; stages 2 and 3.")
    activation_checkpointing: bool = Field(
        False, description="Keep each block's input alone and compute the rest again on the way back: a third slower."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of weights and activations (masters are float32); auto: the model's."
    )
    eval_every: int = Field(0, ge=0, description="Steps between evaluations; 0: one at the end.")
    checkpoint_every: int = Field(0, ge=0, description="Steps between checkpoints; 0: one at the end.")
    threads: Count = Field(1, description="CPU threads of a rank.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where ranks work; auto: GPUs if there are.")
    address: str | None = Field(None, description="An existing Ray cluster (host:port); default: one of its own.")
    trust_remote_code: bool = Field(False, description="Let the checkpoint's own Python code run.")
    experiment: str = Field("espalier", description="MLflow experiment.")
    run_name: str | None = Field(None, description="Name of the run in MLflow; default: made from the options.")
    parent_run: str | None = Field(None, description="MLflow run that this one is part of.")

    @field_validator("zero_stage")
    @classmethod
    def _stage(cls, value: int) -> int:
        if not 0 <= value <= 3:
            raise Refusal(f"zero-stage {value}: ZeRO has stages 0, 1, 2 and 3; choose one of them")
        return value

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
