"""What `espalier retrain` and `espalier track` are asked for alike: how to train, on which ranks, recorded where."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from espalier.pipeline.config.options import BOS_HELP, Count, Length, Panel
from espalier.stages.errors import Refusal
from espalier.stages.text.openings import Bos

NotNegative = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class TrainingConfig(BaseModel):
    """The fields that both have, with the defaults of `espalier retrain`; one says again what it has otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | dict[str, Any]
    output: Annotated[str, Panel.WHAT]
    data: Annotated[str | list[str] | list[list[int]], Panel.WHAT]
    steps: Annotated[Count | None, Panel.TRAINING] = Field(None, description="Optimizer steps.")
    batch: Annotated[Count, Panel.TRAINING] = Field(32, description="Windows in an optimizer step, over all ranks.")
    microbatch: Annotated[Count | Literal["auto"], Panel.TRAINING] = Field(
        "auto", description="Windows in a forward pass on one rank; auto: about 8192 tokens that divide the batch."
    )
    length: Annotated[Length, Panel.TEXT] = Field(
        "auto", description="Tokens in a window; auto: 2048, or the model's context if that is shorter."
    )
    bos: Annotated[Bos, Panel.TEXT] = Field("auto", description=BOS_HELP)
    learning_rate: Annotated[Positive, Panel.TRAINING] = Field(1e-4, description="Peak, of Adam with decoupled decay.")
    schedule: Annotated[Literal["cosine", "linear", "constant"], Panel.TRAINING] = Field(
        "cosine", description="How the learning rate falls, to a tenth of the peak, or that it does not."
    )
    warmup: Annotated[NotNegative, Panel.TRAINING] = Field(0, description="Steps over which the learning rate climbs.")
    weight_decay: Annotated[float, Panel.TRAINING] = Field(
        0.0, ge=0, description="Of matrices; biases and norm gains do not decay."
    )
    beta2: Annotated[float, Panel.TRAINING] = Field(
        0.999, gt=0, lt=1, description="Adam's decay of squared gradients; the other is 0.9."
    )
    clip: Annotated[float, Panel.TRAINING] = Field(1.0, ge=0, description="Largest norm of the gradient; 0: as it is.")
    eval_every: Annotated[NotNegative, Panel.TRAINING] = Field(
        0, description="Steps between evaluations; 0: one at the end."
    )
    checkpoint_every: Annotated[NotNegative, Panel.TRAINING] = Field(
        0, description="Steps between checkpoints; 0: one at the end."
    )
    seed: Annotated[NotNegative, Panel.TEXT] = Field(0, description="Seed of everything random.")
    shadow_schedule: Annotated[Literal["linear", "exponential", "uniform"], Panel.SHADOW] = Field(
        "linear", description="How later snapshots weigh more than earlier ones, or that they do not."
    )
    shadow_decay: Annotated[float, Panel.SHADOW] = Field(
        0.99, description="Of exponential: a snapshot's weight beside the next."
    )
    shadow_signed: Annotated[bool, Panel.SHADOW] = Field(
        True, description="Average weights; otherwise their magnitudes."
    )
    shadow_window: Annotated[Count | None, Panel.SHADOW] = Field(
        None, description="Count only so many last snapshots; default: all."
    )
    shadow_dtype: Annotated[Literal["fp32", "bf16", "int8"], Panel.SHADOW] = Field(
        "fp32", description="What averages are kept in."
    )
    shadow_every: Annotated[Count, Panel.SHADOW] = Field(10, description="Optimizer steps between snapshots.")
    zero_stage: int = Field(
        1, description="What ZeRO partitions: 1 optimizer state, 2 and gradients, 3 and parameters; 0: nothing."
    )
    ranks: Count | Literal["auto"] = Field("auto", description="Processes to train on; auto: one a GPU, or one a core.")
    offload: bool = Field(False, description="Keep optimizer state in CPU memory and step there; stages 2 and 3.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of weights and activations (masters are float32); auto: the model's."
    )
    threads: Count = Field(1, description="CPU threads of a rank.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where ranks work; auto: GPUs if there are.")
    address: str | None = Field(None, description="An existing Ray cluster (host:port); default: one of its own.")
    experiment: Annotated[str, Panel.RECORD] = Field("espalier", description="MLflow experiment.")
    run_name: Annotated[str | None, Panel.RECORD] = Field(
        None, description="Name of the run in MLflow; default: made from the options."
    )

    @field_validator("zero_stage")
    @classmethod
    def _stage(cls, value: int) -> int:
        if not 0 <= value <= 3:
            raise Refusal(f"zero-stage {value}: ZeRO has stages 0, 1, 2 and 3; choose one of them")
        return value
