"""What a rank of a training run will hold, and whether that fits: from the model's facts alone, before the ranks start.

Counted as DeepSpeed keeps it: masters and Adam's moments in float32, its buffers, and what a pass keeps for the way
back. Of a Llama of 25 M parameters on two CPU ranks, stages 1 and 3, peaks were 0.82 to 1.02 of the estimate.
"""

from dataclasses import asdict, dataclass

from espalier.cluster.connection.inventory import Node
from espalier.pipeline.planning.model_info import ModelInfo
from espalier.pipeline.planning.placement import memory_per_process
from espalier.stages.errors import Refusal
from espalier.stages.training.spec import MOST_BUCKET, MOST_GATHERED, RetrainSpec

PROCESS_BYTES = 700 << 20  # a rank's process with torch, transformers and DeepSpeed loaded, and nothing else
MASTER, MOMENTS = 4, 8  # bytes of a float32 master, and of Adam's two moments
SHADOW = {"fp32": 4, "bf16": 4, "int8": 2}  # bytes an average is kept in, at most


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEstimate:
    """Bytes one rank is expected to need. `peak`: of its process on a CPU, of its device on a GPU."""

    parameters: int  # with their masters
    optimizer: int
    gradients: int
    buffers: int  # of reductions, and in stage 3 what is gathered
    activations: int
    shadow: int
    peak: int


def estimate_rank(facts: ModelInfo, spec: RetrainSpec, ranks: int, length: int, device: str) -> RankEstimate:
    """What each rank needs; with offload on a GPU, masters and moments are in the host's memory."""
    count, stage = facts.parameters, spec.zero_stage
    share = -(-count // ranks) if stage else count
    size = 4 if spec.dtype == "float32" else 2
    weights = size * (share if stage == 3 else count)
    shared = size == 4 and (stage == 0 or (stage == 3 and not spec.offload))  # the parameters are their own masters
    masters, moments = (0 if shared else MASTER * share), MOMENTS * share
    gradients = (size * count if stage < 2 else 0) + (MASTER * share if stage else 0)
    buffers = 2 * size * min(MOST_BUCKET, count) + (size * min(MOST_GATHERED, count) if stage == 3 else 0)
    activations = _activation_bytes(facts, spec, length, size)
    shadow = SHADOW[spec.shadow.dtype] * share if spec.shadow is not None else 0
    held = weights + gradients + buffers + activations
    if device == "cpu":
        kept = PROCESS_BYTES + masters + moments + shadow
        held = kept + max(held, weights + size * count)  # at the end rank 0 puts the whole model together
    elif not spec.offload:
        held += masters + moments
    return RankEstimate(
        parameters=weights + masters,
        optimizer=moments,
        gradients=gradients,
        buffers=buffers,
        activations=activations,
        shadow=shadow,
        peak=held,
    )


def _activation_bytes(facts: ModelInfo, spec: RetrainSpec, length: int, size: int) -> int:
    """What a micro-batch keeps for the way back: what goes into and comes out of each matrix and two norms in float32,
    of every block or, with activation checkpointing, of one and the inputs of the others; and float32 logits thrice.
    """
    tokens = spec.microbatch * length
    blocks = [sum(out + into for _, out, into in layers) * size + 16 * facts.hidden for layers in facts.layers]
    kept = sum(blocks)
    if spec.activation_checkpointing:
        kept = max(blocks) + len(blocks) * facts.hidden * size
    return tokens * (kept + 12 * facts.vocabulary)


def check_ranks_fit(estimate: RankEstimate, spec: RetrainSpec, ranks: int, members: list[Node], device: str) -> None:
    """Raises Refusal, with the figures, unless a rank has the memory it needs on the tightest node of the cluster."""
    room = memory_per_process(members, ranks, device)
    if estimate.peak <= room:
        return
    parts = {name: value for name, value in asdict(estimate).items() if name != "peak" and value}
    parts_named = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in parts.items())
    remedies = [
        "a higher --zero-stage" if spec.zero_stage < 3 and ranks > 1 else "",
        "--offload" if device == "cuda" and not spec.offload else "",
        "a smaller --microbatch" if spec.microbatch > 1 else "",
        "" if spec.activation_checkpointing else "--activation-checkpointing",
        "a shorter --length" if spec.microbatch == 1 else "",
        "more nodes",
    ]
    raise Refusal(
        f"ranks {ranks}: each would need {estimate.peak / 1e9:.1f} GB and has {room / 1e9:.1f} GB ({parts_named}); use "
        f"{', '.join(remedy for remedy in remedies if remedy)}"
    )
