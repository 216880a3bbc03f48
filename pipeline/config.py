"""What a run was asked for: one frozen, typed object, the same names on the command line, in YAML and in Python."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator, model_validator

from stages.criteria import CRITERIA, check_criterion
from stages.errors import Refusal
from stages.masks import check_sparsity, parse_pattern

Count = Annotated[int, Field(ge=1)]


class ClusterConfig(BaseModel):
    """What every command that runs a model on shards needs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="Checkpoint directory (safetensors) or hub id.")
    length: int | Literal["auto"] = Field(
        "auto", description="Tokens in a window; auto: 2048, or the model's context if that is shorter."
    )
    shards: Count | Literal["auto"] = Field(
        "auto", description="Actors that share the blocks; auto: one a GPU or core."
    )
    threads: Count = Field(1, description="CPU threads of a shard. Results depend on it in the last bits.")
    microbatch: Count | Literal["auto"] = Field(
        "auto", description="Windows streamed together; auto: about 2048 tokens. Last bits depend on it."
    )
    window: Count = Field(4, description="Microbatches in flight at once.")
    resident: Literal["all", "one", "auto"] = Field(
        "auto", description="Hold all of a shard's blocks in memory, or one at a time; auto: all if they fit."
    )
    spool_memory: ByteSize = Field(
        ByteSize(1 << 30), validate_default=True, description="Memory of a shard for activations; beyond it, disk."
    )
    scratch: str | None = Field(None, description="Directory for activations; default: beside the result.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="Compute and save in; auto: the model's.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where shards work; auto: GPUs if there are.")
    address: str | None = Field(None, description="An existing Ray cluster (host:port); default: one of its own.")
    trust_remote_code: bool = Field(False, description="Let the checkpoint's own Python code run.")

    @field_validator("length")
    @classmethod
    def _length(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 2:
            raise Refusal(f"length {value}: a window must have at least 2 tokens")
        return value


class EvalConfig(ClusterConfig):
    """What `espalier eval` was asked for."""

    data: str = Field(description="Text: text file, JSONL, Parquet, a folder of those, or hub data set.")
    against: str | None = Field(None, description="A second checkpoint, the dense one say, measured on the same text.")


class PruneConfig(ClusterConfig):
    """Everything that decides a pruning run. Each field is also a flag of `espalier prune` and a key of its YAML."""

    output: str = Field(description="Directory for the pruned checkpoint; must be new or empty.")
    calibration: str | list[str] | list[list[int]] = Field(
        description="Calibration text: text file, JSONL, Parquet, a folder of those, or hub data set."
    )
    sparsity: float = Field(0.5, description="Share of the weights to remove, at least 0 and below 1.")
    pattern: str | None = Field(None, description="N:M instead of --sparsity: keep N of every M inputs, such as 2:4.")
    criterion: str = Field("wanda", description=f"How weights are scored: {', '.join(CRITERIA)}.")
    scope: Literal["row", "matrix"] = Field("row", description="Compare scores within each output row or the matrix.")
    reconstruct: Literal["component", "none"] = Field(
        "component", description="Refit attention and MLP, each against its dense output, or leave the kept weights."
    )
    inputs: Literal["dense"] = Field("dense", description="What a unit reads while refitted: the dense activations.")
    epochs: Count = Field(1, description="Passes over the calibration while refitting.")
    batch: Count = Field(2, description="Samples in one refitting step.")
    learning_rate: float = Field(
        0.4, gt=0, description="Peak, in units of the weights' RMS over the root of the hidden width."
    )
    samples: Count = Field(128, description="Calibration windows.")
    eval: str | None = Field(None, description="Text to measure perplexity on, dense and pruned; same forms.")
    seed: int = Field(0, ge=0, description="Seed of everything random.")
    experiment: str = Field("espalier", description="MLflow experiment.")
    run_name: str | None = Field(None, description="Name of the run in MLflow; default: made from the recipe.")

    @field_validator("sparsity")
    @classmethod
    def _sparsity(cls, value: float) -> float:
        return check_sparsity(value)

    @field_validator("criterion")
    @classmethod
    def _criterion(cls, value: str) -> str:
        return check_criterion(value)

    @field_validator("pattern")
    @classmethod
    def _pattern(cls, value: str | None) -> str | None:
        if value is not None:
            parse_pattern(value)
        return value

    @model_validator(mode="after")
    def _one_target(self) -> "PruneConfig":
        if self.pattern is not None and "sparsity" in self.model_fields_set:
            raise Refusal(f"sparsity {self.sparsity} and pattern {self.pattern}: give one of the two")
        return self

    @property
    def groups(self) -> tuple[int, int] | None:
        """The N:M pattern as (N, M)."""
        return parse_pattern(self.pattern) if self.pattern else None

    @property
    def recipe_name(self) -> str:
        """Such as `wanda 50% + component`."""
        amount = self.pattern or f"{100 * self.sparsity:g}%"
        return f"{self.criterion} {amount}" + ("" if self.reconstruct == "none" else f" + {self.reconstruct}")


Config = TypeVar("Config", bound=ClusterConfig)


def build_config(values: Mapping[str, Any], kind: type[Config]) -> Config:
    """A checked configuration. Raises Refusal, one line, for an unknown or missing name and for a bad value."""
    known = list(kind.model_fields)
    for name in values:
        if name not in known:
            nearest = get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]}?" if nearest else f"options: {', '.join(known)}"
            raise Refusal(f"option {name!r} is unknown; {hint}")
    try:
        return kind(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0]) if problem["loc"] else "configuration"
        if isinstance(cause := problem.get("ctx", {}).get("error"), Refusal):
            raise cause from None
        if problem["type"] == "missing":
            written = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
            raise Refusal(f"option {name} is missing; give {written} or put it in the YAML") from None
        raise Refusal(f"option {name} = {problem['input']!r}: {problem['msg'].lower()}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The options of a YAML file, dashes and underscores alike. Raises Refusal if it is no mapping of options."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise Refusal(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise Refusal(f"{path}: must hold options, one `name: value` a line")
    return {str(name).replace("-", "_"): value for name, value in content.items()}
