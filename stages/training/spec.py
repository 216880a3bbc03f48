"""The specification of a training run for its ranks: plain values, made by the driver, the same on all ranks."""

from dataclasses import dataclass
from typing import Literal

import torch

from espalier.stages.data.training_batches import SourceSpec
from espalier.stages.shadow.spec import ShadowSpec

# What DeepSpeed sets aside, as the engine tells it and the estimate of a rank's memory counts it.
MOST_BUCKET = 50_000_000  # elements reduced or gathered at once
MOST_GATHERED = 1_000_000_000  # elements of parameters that stage 3 keeps whole at once
Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrainSpec:
    """One training run as its ranks see it."""

    model: str  # directory: a checkpoint, or a config.json alone, which begins from random weights
    mask: str | None  # directory of a checkpoint of the same shapes: where it is zero, this model is made zero
    home: str  # the run's own directory, seen by all ranks: checkpoints
    data: SourceSpec
    eval: SourceSpec | None
    zero_stage: int
    offload: bool
    masked: bool
    dtype: Precision
    steps: int
    batch: int  # sequences in an optimizer step, over all ranks
    microbatch: int  # sequences in one forward pass on one rank
    learning_rate: float
    schedule: Schedule
    warmup: int  # steps
    weight_decay: float  # on parameters of two or more dimensions
    beta2: float
    clip: float  # largest norm of the whole gradient; 0: as it is
    seed: int
    eval_every: int  # steps; 0: only after the last
    checkpoint_every: int  # steps; 0: only after the last
    shadow: ShadowSpec | None = None  # average the weights on the way
    activation_checkpointing: bool = False  # keep blocks' inputs alone for the way back
    trust_remote_code: bool = False

    def accumulation(self, ranks: int) -> int:
        """Micro-batches that each rank runs in one optimizer step."""
        return self.batch // (self.microbatch * ranks)
