"""The configuration of `espalier track`: a recipe's YAML, the same names as flags, one frozen object."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from espalier.pipeline.config.options import Before, Count, Panel, build_config, read_yaml
from espalier.pipeline.config.training import NotNegative, Positive, TrainingConfig
from espalier.stages.errors import Refusal, unknown

RECIPES = Path(__file__).parent / "recipes" / "track"
# What data there is to track on: a name -> "module:function", a `espalier.pipeline.weight_tracking.data.Prepare`.
DATA_KINDS = {
    "characters": "espalier.pipeline.weight_tracking.data:characters",
    "text": "espalier.pipeline.weight_tracking.data:text",
    "pictures": "espalier.pipeline.weight_tracking.pictures.data:pictures",
}


class TrackConfig(TrainingConfig):
    """Everything that decides a tracking experiment. Each field is also a key of a recipe, and most are flags."""

    model: str | dict[str, Any] = Field(
        description="A checkpoint to go on from, or what a config.json says, to begin from random weights."
    )
    data: str = Field(description="What to train on: a text file, or whatever the recipe's kind of data asks for.")
    output: Annotated[str, Panel.WHERE, Before("zero_stage")] = Field(
        "tracked", description="Directory of the experiment; given again, it goes on."
    )
    data_kind: Annotated[str, Panel.TEXT, Before("length")] = Field(
        "characters", description=f"How the data is read: {', '.join(DATA_KINDS)}."
    )
    data_options: Annotated[dict[str, Any], Panel.TEXT, Before("length")] = Field(
        {}, description="An option of the kind of data; may be given again."
    )
    held_out: Annotated[float, Panel.TEXT, Before("length")] = Field(
        0.1, gt=0, lt=1, description="Share of the data, at its end, that is evaluated on."
    )
    length: int = Field(256, ge=2, description="Tokens in a window.")

    steps: Count = Field(5000, description="Optimizer steps of the training that is tracked.")
    batch: Count = 64
    microbatch: Count | Literal["auto"] = Field("auto", description="Windows in a forward pass on one rank.")
    learning_rate: Positive = 1e-3
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="How the learning rate falls.")
    warmup: NotNegative = 100
    weight_decay: float = Field(0.1, ge=0)
    beta2: float = Field(0.99, gt=0, lt=1, description="Adam's decay of squared gradients.")
    eval_every: NotNegative = Field(0, description="Steps between evaluations while training; 0: one at the end.")
    checkpoint_every: NotNegative = Field(0, description="Steps between checkpoints while training; 0: one at the end.")

    score: Annotated[Literal["temporal", "final"], Panel.MASKS] = Field(
        "temporal", description="What a weight is pruned by: its shadow's size, or its own after the last step."
    )
    shadow_schedule: Literal["linear", "exponential", "uniform"] = Field(
        "linear", description="How much later snapshots count than earlier ones."
    )
    shadow_decay: float = Field(0.99, gt=0, le=1, description="Of the exponential schedule: an older snapshot's share.")
    shadow_signed: bool = Field(True, description="Average the weights; else their magnitudes.")
    shadow_window: Count | None = Field(None, description="Only so many snapshots count, the last ones; default: all.")
    shadow_dtype: Literal["fp32", "bf16", "int8"] = Field("fp32", description="How the shadow is kept in memory.")

    rates: Annotated[list[float] | None, Panel.MASKS] = Field(
        None,
        description="Thresholds, R,R,...: a weight goes if its score is below R deviations of its matrix's.",
    )
    sparsities: Annotated[list[float] | None, Panel.MASKS] = Field(
        None, description="Instead of rates: shares to remove, S,S,...; each rate is the one that lands there."
    )
    finetune_epochs: Annotated[float | None, Panel.TRAINING] = Field(
        None, gt=0, description="Passes over the data after pruning."
    )
    finetune_steps: Annotated[Count | None, Panel.TRAINING] = Field(
        None, description="Instead of passes: optimizer steps after pruning."
    )
    finetune_learning_rate: Annotated[Positive, Panel.TRAINING] = Field(5e-4, description="Peak while fine-tuning.")

    zero_stage: int = Field(1, description="What ZeRO partitions, see `espalier retrain`.")
    offload: Annotated[bool, Before("ranks")] = Field(
        False, description="Keep optimizer state in CPU memory; stages 2 and 3."
    )
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], Before("device")] = Field(
        "auto", description="Of weights and activations."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to work; auto: GPUs if there are.")
    experiment: str = "espalier-track"
    published: dict[str, list[tuple[float, float]]] = Field(
        {}, description="Curves to show beside this one: name -> (sparsity, loss) points."
    )

    @field_validator("data_kind")
    @classmethod
    def _data_kind(cls, value: str) -> str:
        if value not in DATA_KINDS:
            raise Refusal(f"data-kind {value!r} {unknown(value, DATA_KINDS)}")
        return value

    @field_validator("data_options", mode="before")
    @classmethod
    def _data_options(cls, value: Any) -> Any:
        """From the command line's name=value, or from a mapping."""
        if not isinstance(value, list):
            return value
        pairs = [text.partition("=") for text in value]
        for name, equals, _ in pairs:
            if not name or not equals:
                raise Refusal(f"data-option {name!r}: write name=value")
        return {name.strip(): text.strip() for name, _, text in pairs}

    @field_validator("rates", "sparsities", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: Any) -> Any:
        """From 0,0.5,1 as text, from one number, or from a list."""
        if value is None:
            return None
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
        try:
            numbers = [float(part) for part in parts]
        except (TypeError, ValueError):
            raise Refusal(f"{info.field_name} {value}: give numbers, such as 0,0.5,1") from None
        shown = ",".join(f"{number:g}" for number in numbers)
        if not numbers or sorted(set(numbers)) != numbers:
            raise Refusal(f"{info.field_name} {shown}: must be increasing; sort them, each once")
        if not 0 <= numbers[0] <= numbers[-1] < float("inf"):
            raise Refusal(f"{info.field_name} {shown}: must be at least 0")
        if info.field_name == "sparsities" and numbers[-1] >= 1:
            raise Refusal(f"sparsities {shown}: must be below 1; 0.6 is 60 %")
        return numbers

    @model_validator(mode="after")
    def _together(self) -> "TrackConfig":
        """What fits each by itself and not all together."""
        _exactly_one("rates", self.rates, "sparsities", self.sparsities)
        _exactly_one("finetune-epochs", self.finetune_epochs, "finetune-steps", self.finetune_steps)
        if self.shadow_every > self.steps:
            raise Refusal(f"shadow-every {self.shadow_every}: no snapshot in {self.steps} steps; give a smaller one")
        if self.score == "final" and self.steps % self.shadow_every:
            raise Refusal(
                f"score final with shadow-every {self.shadow_every}: the last of {self.steps} steps is no snapshot; "
                "give a divisor of the steps"
            )
        if self.score == "final" and self.shadow_window not in (None, 1):
            raise Refusal(f"score final with shadow-window {self.shadow_window}: only the last weights count; leave it")
        return self

    @property
    def window(self) -> int | None:
        """Snapshots that count. What a weight weighs at the end is a shadow whose window is the last snapshot."""
        return 1 if self.score == "final" else self.shadow_window

    @property
    def name(self) -> str:
        """Such as `linear` or `exponential, window 10, int8`: what is tracked, in words."""
        if self.score == "final":
            return "final weights"
        parts = [self.shadow_schedule if self.shadow_signed else f"{self.shadow_schedule} of magnitudes"]
        parts += [f"window {self.shadow_window}"] if self.shadow_window else []
        return ", ".join([*parts, *([] if self.shadow_dtype == "fp32" else [self.shadow_dtype])])


def load_config(recipe: str, flags: dict[str, Any]) -> TrackConfig:
    """The recipe of that name, or in that YAML file, with what `flags` say instead.

    Raises Refusal, with the nearest name, for a recipe that is not there, and for all that a TrackConfig refuses.
    """
    values = read_yaml(_recipe_file(recipe))
    for one, other in (("rates", "sparsities"), ("finetune_epochs", "finetune_steps")):
        for name, rival in ((one, other), (other, one)):
            if name in flags and rival not in flags:
                values.pop(rival, None)  # a flag overrides the recipe's other way to say it
    if isinstance(flags.get("data_options"), list) and values.get("data_options"):
        own = [f"{name}={value}" for name, value in values["data_options"].items()]
        flags = flags | {"data_options": own + flags["data_options"]}
    return build_config(values | flags, TrackConfig)


def recipes() -> dict[str, Path]:
    """The recipes that come with Espalier."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def _recipe_file(recipe: str) -> Path:
    path = Path(recipe).expanduser()
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise Refusal(f"recipe {recipe}: no such file; give a YAML file, or one of {', '.join(recipes())}")
        return path
    if recipe not in recipes():
        raise Refusal(f"recipe {recipe!r} {unknown(recipe, recipes())}; or give a YAML file")
    return recipes()[recipe]


def _exactly_one(name: str, value: object, other: str, other_value: object) -> None:
    if value is None and other_value is None:
        raise Refusal(f"{name}, {other}: neither is given; give one of the two")
    if value is not None and other_value is not None:
        raise Refusal(f"{name} {value} and {other} {other_value}: give one of the two")
