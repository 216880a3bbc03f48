"""A pass of microbatches through shard actors: one after the other through all of them, or shard by shard."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayTaskError

from espalier.cluster.connection.room import answered
from espalier.cluster.shard_actor import Inputs
from espalier.stages.errors import DeviceLost, OutOfStep, Refusal
from espalier.stages.shard.hidden_states import Pass

MEASURED = (
    "measures",
    "kept",
    "compared",
)  # what takes the tokens themselves too: see espalier.cluster.shard_actor.Wanted

Batches = Callable[[int], Inputs]  # microbatch number -> tokens (samples, length) int32, or inputs with images


@dataclass(frozen=True, slots=True)
class Stream:
    """A pass of tokens through the shards."""

    batches: Batches
    microbatches: int
    in_flight: int  # microbatches in flight at once
    varying: Mapping[str, np.ndarray] | None = None  # of all samples, the inputs that shape how blocks are called


def answers(references: Any) -> Any:
    """What shards answered. Raises what a shard refused as it was said there, and Refusal where one has no room."""
    try:
        return answered(references)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, Refusal | OutOfStep | DeviceLost):
            raise cause from None
        raise


def begin(actors: Sequence[Any], stream: Stream, passes: Sequence[Pass]) -> None:
    """Tell the shards that a pass begins, and each what it does in it.

    What varies from sample to sample is once in the object store for all of them.
    """
    varying = None if stream.varying is None else ray.put(stream.varying)
    answers([actor.begin.remote(this, varying) for actor, this in zip(actors, passes, strict=True)])


def pipelined(actors: Sequence[Any], stream: Stream, wanted: str, on_step: Callable[[int], None]) -> list[Any]:
    """Microbatches flow from shard to shard, at most `in_flight` of them on the way."""

    def launch(microbatch: int) -> Any:
        tokens = source = stream.batches(microbatch)
        for actor in actors[:-1]:
            source = actor.forward.remote(microbatch, source, "hidden")
        targets = tokens if wanted in MEASURED else None
        return actors[-1].forward.remote(microbatch, source, wanted, targets)

    return windowed(launch, stream, on_step)


def blockwise(
    actors: Sequence[Any], stream: Stream, wanted: str, on_step: Callable[[int], None], onward: bool
) -> list[Any]:
    """Each shard takes all microbatches through its blocks, one block in memory, before the next shard starts; the last
    one only if they are to go `onward`."""
    for position, actor in enumerate(actors):
        receive = receiving(actors, position, stream)
        windowed(receive, stream, on_step if position == 0 else lambda _: None)
        if onward or position + 1 < len(actors):
            answers(actor.advance.remote())
    if not onward:
        return []

    def emit(microbatch: int) -> Any:
        targets = stream.batches(microbatch) if wanted in MEASURED else None
        return actors[-1].emit.remote(microbatch, wanted, targets)

    return windowed(emit, stream, lambda _: None)


def receiving(actors: Sequence[Any], position: int, stream: Stream) -> Callable[[int], Any]:
    """Hands one microbatch to a shard: tokens to the first, to another what the one before it emits."""
    actor = actors[position]

    def receive(microbatch: int) -> Any:
        if position == 0:
            return actor.receive.remote(microbatch, stream.batches(microbatch))
        return actor.receive.remote(microbatch, actors[position - 1].emit.remote(microbatch, "hidden"))

    return receive


def windowed(launch: Callable[[int], Any], stream: Stream, on_step: Callable[[int], None]) -> list[Any]:
    """What `launch` answers for each microbatch, in order, with at most `in_flight` of them under way."""
    flying: deque[Any] = deque()
    landed: list[Any] = []
    for microbatch in range(stream.microbatches):
        flying.append(launch(microbatch))
        while len(flying) >= stream.in_flight or (flying and microbatch + 1 == stream.microbatches):
            landed.append(answers(flying.popleft()))
            on_step(len(landed))
    return landed
