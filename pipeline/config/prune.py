"""The configuration of `espalier prune`: one frozen, typed object, the same names as flags, in YAML and in Python."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, field_validator, model_validator

from espalier.pipeline.config.named_recipe import RecipeName, recipe_options
from espalier.pipeline.config.options import BOS_HELP, COLUMN_HELP, Count, Length, Panel
from espalier.stages.criteria.equations import CRITERIA
from espalier.stages.criteria.scoring import check_criterion, check_options
from espalier.stages.errors import Refusal
from espalier.stages.layer_rules import Override, resolve_overrides
from espalier.stages.masks import check_sparsity, check_threshold, parse_pattern
from espalier.stages.model.families import Tower
from espalier.stages.recipe import Recipe
from espalier.stages.reconstruction.units import UNITS, find_unit
from espalier.stages.refine import REFINEMENTS
from espalier.stages.text.openings import Bos

if TYPE_CHECKING:
    Refine = str
else:
    Refine = Literal["auto", "none", *REFINEMENTS]


class ClusterConfig(BaseModel):
    """What every command that runs a model on shards needs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="Checkpoint directory (safetensors) or hub id.")
    length: Annotated[Length, Panel.TEXT] = Field(
        "auto", description="Tokens in a window; auto: 2048, or the model's context if that is shorter."
    )
    bos: Annotated[Bos, Panel.TEXT] = Field("auto", description=BOS_HELP)
    text_column: Annotated[str | None, Panel.TEXT] = Field(None, description=COLUMN_HELP)
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
    compute: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="What blocks are computed in; auto: the weights' own dtype if the devices have units for it, "
        "else fp32.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="What weights are held and saved in; auto: each tensor as in its file."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where shards work; auto: GPUs if there are.")
    address: str | None = Field(None, description="An existing Ray cluster (host:port); default: one of its own.")
    trust_remote_code: bool = Field(False, description="Let the checkpoint's own Python code run.")


class EvalConfig(ClusterConfig):
    """What `espalier eval` was asked for."""

    data: Annotated[str, Panel.WHAT] = Field(
        description="Text: text file, JSONL, CSV, Parquet, a folder of those, or hub data set."
    )
    against: Annotated[str | None, Panel.WHAT] = Field(
        None, description="A second checkpoint, the dense one say, measured on the same text."
    )


class PruneConfig(ClusterConfig):
    """Everything that decides a pruning run. Each field is also a flag of `espalier prune` and a key of its YAML."""

    output: Annotated[str, Panel.WHAT] = Field(description="Directory for the pruned checkpoint; must be new or empty.")
    calibration: Annotated[str | list[str] | list[list[int]], Panel.WHAT] = Field(
        description="Calibration text: text file, JSONL, CSV, Parquet, a folder of those, or hub data set; for a model "
        "that reads images also a folder of them with captions.jsonl."
    )
    tower: Annotated[Tower, Panel.WHAT] = Field(
        "language",
        description="Which blocks of a model that reads images are pruned; vision: those of its vision tower, the "
        "rest copied as it is.",
    )
    recipe: Annotated[RecipeName, Panel.WHAT] = Field(
        "balanced",
        description="What to do to each layer, by name: fast (masks alone), balanced or best; `espalier plan --recipe "
        "NAME` prints it. Other options go before it.",
    )
    sparsity: Annotated[float, Panel.MASKS] = Field(
        0.5, description="Share of the weights to remove, at least 0 and below 1."
    )
    pattern: Annotated[str | None, Panel.MASKS] = Field(
        None, description="N:M instead of --sparsity: keep N of every M inputs, such as 2:4."
    )
    threshold: Annotated[float | None, Panel.MASKS] = Field(
        None, description="Instead of --sparsity: keep what scores above so many standard deviations of its matrix."
    )
    criterion: Annotated[str, Panel.MASKS] = Field(
        "alps", description=f"How weights are scored: {', '.join(CRITERIA)}, or your own as module.function."
    )
    criterion_options: Annotated[dict[str, Any], Panel.MASKS] = Field(
        {}, description="An option of the criterion, such as alpha=0.5; may be given again for another."
    )
    shadow: Annotated[str | None, Panel.MASKS] = Field(
        None, description="For criterion temporal: the shadow/ that a training run left in its output."
    )
    scope: Annotated[Literal["auto", "row", "matrix"], Panel.MASKS] = Field(
        "auto", description="Compare scores within each output row or the matrix; auto: rows, with alps the matrix."
    )
    allocation: Annotated[Literal["uniform", "owl"], Panel.MASKS] = Field(
        "uniform", description="The same sparsity in every block, or less in those with more outliers."
    )
    overrides: list[Any] = Field([], description="What is different in some layers, in YAML only.")
    refine: Annotated[Refine, Panel.MASKS] = Field(
        "auto",
        description="Exchange pruned for kept weights before reconstruction; auto: swaps where units are reconstructed "
        "and that costs much more, else none, as with alps.",
    )
    solve: Annotated[Literal["auto", "on", "off"], Panel.MASKS] = Field(
        "auto",
        description="Give the weights that stay the values that are best for their mask, by least squares, before any "
        "reconstruction; auto: where the inputs' Gram matrix is there anyway (swaps, sparsegpt, alps).",
    )
    targets: Annotated[Literal["auto", "plain", "corrected"], Panel.MASKS] = Field(
        "auto",
        description="What solved values aim at: what the layer makes of what it reads (plain), or what it gave in the "
        "dense model, so that it also takes back what the layers before it lost (corrected); auto: corrected where "
        "values are solved.",
    )
    reconstruct: Annotated[str, Panel.RECONSTRUCTION] = Field(
        "block",
        description="What is trained as one to give its dense output again: "
        f"{', '.join(unit.written for unit in UNITS.values())}, or none: the kept weights stay as they were.",
    )
    inputs: Annotated[Literal["dense", "pruned"], Panel.RECONSTRUCTION] = Field(
        "dense",
        description="What a unit reads while it is scored and reconstructed: the dense model's activations, all blocks "
        "at once, or those of the blocks pruned so far, one after the other.",
    )
    sweeps: Annotated[int, Panel.RECONSTRUCTION] = Field(
        0,
        ge=0,
        description="Reconstruct all blocks again, at once, this often: each time on what the pruned model gives.",
    )
    correction: Annotated[Literal["auto", "foreseen"] | list[float], Panel.RECONSTRUCTION] = Field(
        "auto",
        description="Share of the accumulated error that a unit takes back in a sweep, one for all or C,C,...; auto, "
        "or foreseen: all that the units before it, reconstructed at the same time, are foreseen to leave.",
    )
    tolerance: Annotated[float, Panel.RECONSTRUCTION] = Field(
        0.01,
        ge=0,
        lt=1,
        description="Relative error of its output on held-out samples up to which a unit is left as it is: there is "
        "little to gain.",
    )
    epochs: Annotated[Count, Panel.RECONSTRUCTION] = Field(
        1, description="Passes over the calibration in a reconstruction."
    )
    batch: Annotated[Count, Panel.RECONSTRUCTION] = Field(2, description="Samples in one reconstruction step.")
    learning_rate: Annotated[float, Panel.RECONSTRUCTION] = Field(
        0.4, gt=0, description="Peak, in units of the weights' RMS over the root of the hidden width."
    )
    samples: Annotated[Count, Panel.TEXT] = Field(128, description="Calibration windows.")
    eval: Annotated[str | None, Panel.TEXT] = Field(
        None, description="Text to measure perplexity on, dense and pruned; same forms."
    )
    seed: Annotated[int, Panel.TEXT] = Field(0, ge=0, description="Seed of everything random.")
    experiment: Annotated[str, Panel.RECORD] = Field("espalier", description="MLflow experiment.")
    run_name: Annotated[str | None, Panel.RECORD] = Field(
        None, description="Name of the run in MLflow; default: made from the recipe."
    )
    parent_run: Annotated[str | None, Panel.RECORD] = Field(None, description="MLflow run that this one is part of.")

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        """What the recipe of that name sets, where nothing else is said."""
        if not isinstance(given, dict):
            return given
        return recipe_options(str(given.get("recipe", cls.model_fields["recipe"].default))) | given

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

    @field_validator("threshold")
    @classmethod
    def _threshold(cls, value: float | None) -> float | None:
        return value if value is None else check_threshold(value)

    @field_validator("criterion_options", mode="before")
    @classmethod
    def _criterion_options(cls, value: Any) -> Any:
        """From the command line's name=value, from one such text, or from a mapping."""
        if not isinstance(value, str | list):
            return value
        pairs = [text.partition("=") for text in ([value] if isinstance(value, str) else value)]
        for name, equals, _ in pairs:
            if not name or not equals:
                raise Refusal(f"criterion-option {name!r}: write name=value, such as alpha=0.5")
        return {name.strip(): text.strip() for name, _, text in pairs}

    @field_validator("solve", mode="before")
    @classmethod
    def _solve(cls, value: Any) -> Any:
        return {True: "on", False: "off"}.get(value, value)  # YAML reads on and off as truths

    @field_validator("reconstruct")
    @classmethod
    def _reconstruct(cls, value: str) -> str:
        parse_reconstruct(value)
        return value

    @field_validator("correction", mode="before")
    @classmethod
    def _correction(cls, value: Any) -> Any:
        """From 0.3 or 0.3,0.6 as text, or from numbers."""
        if value in ("auto", "foreseen"):
            return value
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
        try:
            shares = [float(part) for part in parts]
        except (TypeError, ValueError):
            shares = []
        if not shares or not all(0 <= share <= 1 for share in shares):
            raise Refusal(f"correction {value}: give shares from 0 to 1, one for all sweeps or one for each: 0.3,0.6")
        return shares

    @model_validator(mode="after")
    def _together(self) -> "PruneConfig":
        """What fits each by itself and not all together."""
        if self.pattern is not None and "sparsity" in self.model_fields_set:
            raise Refusal(f"sparsity {self.sparsity} and pattern {self.pattern}: give one of the two")
        self._check_threshold()
        if self.pattern is not None and self.allocation == "owl":
            raise Refusal(
                f"allocation owl with pattern {self.pattern}: N:M leaves every block the same; use --sparsity"
            )
        if self.pattern is not None and self.scope == "matrix":
            raise Refusal(f"scope matrix with pattern {self.pattern}: N:M compares within groups; leave --scope out")
        if self.tower == "vision" and self.eval is not None:
            raise Refusal(
                f"eval {self.eval} with tower vision: text does not pass through the vision tower, so its perplexity "
                "would stay the dense model's; leave --eval out"
            )
        check_options(self.criterion, self.criterion_options)
        self._check_sweeps()
        self.rules  # noqa: B018 refuses entries that are wrong in themselves
        if self.targets == "corrected" and not self.block_recipe.solves:
            raise Refusal(
                "targets corrected: they are for values that are solved, and none are; use --solve on or "
                "--criterion alps"
            )
        return self

    def _check_threshold(self) -> None:
        if self.threshold is None:
            return
        for name in ("sparsity", "pattern"):
            if name in self.model_fields_set and getattr(self, name) is not None:
                raise Refusal(f"{name} {getattr(self, name)} and threshold {self.threshold:g}: give one of the two")
        if self.allocation == "owl":
            raise Refusal(
                f"allocation owl with threshold {self.threshold:g}: OWL spreads one sparsity over the blocks, a "
                "threshold finds its own in each; use --sparsity"
            )
        if "scope" in self.model_fields_set and self.scope == "row":
            raise Refusal(f"scope row with threshold {self.threshold:g}: it is one for a matrix; leave --scope out")

    def _check_sweeps(self) -> None:
        unit = find_unit(parse_reconstruct(self.reconstruct)[0])
        if self.sweeps and self.inputs == "pruned":
            raise Refusal(
                f"sweeps {self.sweeps} with inputs pruned: sweeps make up for dense inputs; choose one of the two"
            )
        if self.sweeps and (unit is None or unit.sweep_streams is None):
            able = [f"{name}:N" if each.numbered else name for name, each in UNITS.items() if each.sweep_streams]
            raise Refusal(
                f"sweeps {self.sweeps} with reconstruct {self.reconstruct}: a sweep takes "
                f"{', '.join(able[:-1])} or {able[-1]}"
            )
        if isinstance(self.correction, list) and len(self.correction) not in (1, self.sweeps):
            given = ",".join(f"{share:g}" for share in self.correction)
            raise Refusal(f"correction {given}: {self.sweeps} sweeps take one share, or {self.sweeps}")

    @property
    def rules(self) -> tuple[Override, ...]:
        """The overrides, parsed."""
        return tuple(resolve_overrides(self.overrides))

    @property
    def block_recipe(self) -> Recipe:
        """What every shard does to its blocks; `refine: auto` counts as none until the model is known."""
        unit, blocks_per_unit = parse_reconstruct(self.reconstruct)
        recipe = Recipe(
            criterion=self.criterion,
            criterion_options=check_options(self.criterion, self.criterion_options),
            sparsity=self.sparsity if self.groups is None and self.threshold is None else None,
            pattern=self.groups,
            threshold=self.threshold,
            shadow=self.shadow,
            scope=None if self.scope == "auto" else self.scope,
            overrides=self.rules,
            allocation=self.allocation,
            refine="none" if self.refine == "auto" else self.refine,
            reconstruct=unit,
            blocks_per_unit=blocks_per_unit,
            inputs=self.inputs,
            tolerance=self.tolerance,
            epochs=self.epochs,
            batch=self.batch,
            learning_rate=self.learning_rate,
            sweeps=self.sweeps,
            corrections=self._corrections,
            seed=self.seed,
        )
        there = self.solve == "auto" and "hessian" in recipe.needs and self.criterion_options.get("update") is None
        recipe = replace(recipe, solve=there or self.solve == "on")
        return replace(recipe, targets="corrected" if self.targets != "plain" and recipe.solves else "plain")

    @property
    def _corrections(self) -> tuple[float, ...]:
        if not isinstance(self.correction, list):
            return ()
        return tuple(self.correction) * (self.sweeps if len(self.correction) == 1 else 1)

    @property
    def groups(self) -> tuple[int, int] | None:
        """The N:M pattern as (N, M)."""
        return parse_pattern(self.pattern) if self.pattern else None

    @property
    def target(self) -> str:
        """How much goes: `50 %`, `2:4` or `1.2 σ`."""
        if self.threshold is not None:
            return f"{self.threshold:g} σ"
        return self.pattern or f"{100 * self.sparsity:g} %"

    @property
    def mask_name(self) -> str:
        """Such as `wanda 50 % + swaps`."""
        name = f"{self.criterion} {self.target}"
        return name if self.refine in ("auto", "none") else f"{name} + {self.refine}"

    @property
    def recipe_name(self) -> str:
        """Such as `wanda 50 % + swaps + component`."""
        parts = [self.mask_name] if self.tower == "language" else ["vision tower", self.mask_name]
        parts += [] if self.reconstruct == "none" else [self.reconstruct]
        parts += ["pruned inputs"] if self.inputs == "pruned" else []
        parts += [f"{self.sweeps} sweep{'s' if self.sweeps > 1 else ''}"] if self.sweeps else []
        return " + ".join(parts)


def parse_reconstruct(text: str) -> tuple[str, int]:
    """`window:4` as ("window", 4), `component` as ("component", 1). Raises Refusal for anything else."""
    name, colon, number = text.partition(":")
    if name in UNITS and UNITS[name].numbered:
        if number.isdigit() and int(number):
            return name, int(number)
    elif not colon and (name in UNITS or name == "none"):
        return name, 1
    raise Refusal(f"reconstruct {text!r}: choose {', '.join(unit.written for unit in UNITS.values())} or none")
