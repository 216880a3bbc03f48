"""A ShardGroup on Ray: what one shard refuses comes out as it was said, and a shard that keeps dying ends the run.

Whole runs that lose a shard are in tests/pipeline/run/test_resume.py.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray import cloudpickle

from espalier.cluster import rank_group as ranks
from espalier.cluster import shard_group as module
from espalier.cluster.connection import room
from espalier.cluster.shard_actor import OPTIONS, RESTARTS, ShardWorker
from espalier.cluster.shard_group import ShardGroup, Stream
from espalier.stages.errors import Refusal
from espalier.stages.recipe import BlockTask, Recipe
from espalier.stages.shard.shard import Shard
from espalier.stages.shard.spec import ShardSpec

pytestmark = [pytest.mark.ray, pytest.mark.slow]
LENGTH, MICROBATCHES = 16, 6


@pytest.fixture
def specs(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> list[ShardSpec]:
    """Two shards of two blocks each, without reconstruction."""
    (tmp_path / "out").mkdir()
    return [
        ShardSpec(
            index=index,
            first=2 * index,
            last=2 * index + 2,
            embeds=index == 0,
            heads=index == 1,
            model=str(tiny_checkpoint()),
            output=str(tmp_path / "out"),
            scratch=str(tmp_path / "scratch"),
            length=LENGTH,
            recipe=Recipe(reconstruct="none"),
        )
        for index in range(2)
    ]


@pytest.fixture
def tokens(tiny_tokens: Callable[..., torch.Tensor]) -> np.ndarray:
    return tiny_tokens(MICROBATCHES, LENGTH).numpy()


def stream(tokens: np.ndarray, in_flight: int = 2) -> Stream:
    return Stream(batches=lambda number: tokens[number : number + 1], microbatches=MICROBATCHES, in_flight=in_flight)


def test_losses_and_refusals_cross_the_shard_group(
    one_cluster: None, specs: list[ShardSpec], tokens: np.ndarray
) -> None:
    events: list[str] = []
    with ShardGroup(specs, 1, None, events.append) as group:
        facts = group.open()
        assert [(fact.index, fact.first, fact.last) for fact in facts] == [(0, 0, 2), (1, 2, 4)]
        assert len({fact.pid for fact in facts} | {os.getpid()}) == 3

        steps: list[int] = []
        measures = group.measure(stream(tokens), steps.append)
        assert measures.tokens == MICROBATCHES * (LENGTH - 1) and steps == list(range(1, MICROBATCHES + 1))
        assert group.measure(stream(tokens, in_flight=5), steps.append) == measures, "whatever the window"

        # Killed between passes: the next pass meets an empty shard, which is opened once more before it is needed.
        os.kill(facts[1].pid, signal.SIGKILL)
        assert group.measure(stream(tokens), steps.append) == measures
        assert all("a shard was lost" in event and "\n" not in event for event in events)

        group.calibrate(stream(tokens), {0, 3}, steps.append)
        orders = [BlockTask(blocks=(0,)), BlockTask(blocks=(3,))]
        reports = [report for reports in group.work(stream(tokens), orders) for report in reports]
        assert sorted(report["block"] for report in reports) == [0, 3], "only what was asked for"

        wrong = tokens.copy()
        wrong[3, 2] = 10_000  # no such row in the embedding: a bug, which is not retried for ever
        with pytest.raises(IndexError):
            group.measure(stream(wrong), steps.append)


def test_a_shard_that_cannot_be_brought_back_ends_the_run_in_one_line(
    one_cluster: None, specs: list[ShardSpec], tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FRUITLESS_RECOVERIES", 0)  # not three: each is a process that imports torch
    events: list[str] = []
    with ShardGroup(specs[:1], 1, None, events.append) as group:
        pid = [group.open()[0].pid]

        def deadly(number: int) -> np.ndarray:
            if number == 2:
                pid[0] = group.open()[0].pid
                os.kill(pid[0], signal.SIGKILL)
            return tokens[number : number + 1]

        with pytest.raises(Refusal, match="a shard was lost 1 times with no block finished between") as caught:
            group.calibrate(Stream(deadly, MICROBATCHES, 1), {0}, lambda _: None)
        assert "\n" not in str(caught.value) and "out of memory" in str(caught.value)
        assert not events


def test_a_node_that_does_not_see_the_run_says_so(one_cluster: None, specs: list[ShardSpec], tmp_path: Path) -> None:
    run_file = str(tmp_path / "elsewhere" / "run.json")
    with (
        ShardGroup(specs[:1], 1, run_file, lambda _: None) as group,
        pytest.raises(Refusal, match=r"not visible on node .* storage that all of them share"),
    ):
        group.open()


class Unlicensed:
    """Ends its process while it is made."""

    def __init__(self, *_: object) -> None:
        sys.stderr.write("no licence for this node\n")
        sys.stderr.flush()
        os._exit(7)

    def open(self) -> None: ...


def test_a_shard_that_dies_at_every_start_is_told_with_what_it_said_last(
    one_cluster: None, specs: list[ShardSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(module, "ShardActor", ray.remote(max_restarts=RESTARTS, max_task_retries=-1)(Unlicensed))
    with (
        ShardGroup(specs[:1], 1, None, print) as group,
        pytest.raises(Refusal, match="died before it was open") as caught,
    ):
        group.open()
    assert f"{RESTARTS} more times" in str(caught.value) and "\n" not in str(caught.value)
    assert "no licence for this node" in str(caught.value)


class Broken(ShardWorker):
    """Its device is lost in every pass."""

    def __init__(self, *run: Any) -> None:
        super().__init__(*run)

        def forward(*_: object) -> torch.Tensor:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nfor debugging consider")

        Shard.forward = forward


def test_a_device_that_is_lost_again_and_again_ends_the_run_with_what_was_said_of_it(
    one_cluster: None, specs: list[ShardSpec], tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(module, "ShardActor", ray.remote(max_restarts=RESTARTS, **OPTIONS)(Broken))
    monkeypatch.setattr(module, "FRUITLESS_RECOVERIES", 1)  # not three: each is a process that imports torch
    events: list[str] = []
    with ShardGroup(specs[:1], 1, None, events.append) as group:
        first = group.open()[0].pid
        with pytest.raises(Refusal, match="a shard was lost 2 times with no block finished between") as caught:
            group.calibrate(stream(tokens), {0}, lambda _: None)
        assert group.open()[0].pid != first, "each time in a process of its own"
    said = "CUDA error: an illegal memory access was encountered, on node "
    assert said in str(caught.value) and "resume" in str(caught.value) and "\n" not in str(caught.value)
    assert len(events) == 1 and said in events[0]


class Holder:
    """Takes room."""


@pytest.fixture
def taken(one_cluster: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Somebody has all that is free of the cluster."""
    monkeypatch.setattr(room, "WAIT_SECONDS", 1.0)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    each = ray.remote(Holder).options(num_cpus=1)
    holders = [each.remote() for _ in range(int(ray.cluster_resources()["CPU"]))]
    ray.get([holder.__ray_ready__.remote() for holder in holders])
    while room.has_room({"CPU": 1.0}):  # the control service hears of it a moment later
        pass
    yield
    for holder in holders:
        ray.kill(holder)


def test_shards_and_ranks_without_room_say_what_they_ask_for_what_is_free_and_who_is_at_work(
    taken: None, specs: list[ShardSpec]
) -> None:
    with pytest.raises(Refusal) as shards, ShardGroup(specs, 1, None, print):
        pass
    with pytest.raises(Refusal) as placed, ranks.RankGroup(2):
        pass
    for caught, who in (shards, "2 shards"), (placed, "2 ranks"):
        said = str(caught.value)
        assert "room for 0;" in said
        assert f"{who} had to wait" in said and "each asks for 1 CPU, free on its nodes: 0 CPU" in said
        assert "Holder of job" in said and "fewer --shards or --ranks" in said and "\n" not in said
