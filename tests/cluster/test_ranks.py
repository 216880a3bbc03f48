"""Ranks without Ray: how many there may be, what is done when they die.

Ranks that train, and one that is killed, are in tests/pipeline/retraining/test_zero_runs.py.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from espalier.cluster import rank_group as module
from espalier.cluster.connection.inventory import Node
from espalier.cluster.rank_group import FRUITLESS_RESTARTS, RankGroup, check_devices
from espalier.stages.errors import Refusal

SPEC: Any = None  # no rank of these tests reads it


def node(cpus: float, gpus: float) -> Node:
    return Node(node_id="n", address="10.0.0.1", cpus=cpus, gpus=gpus, memory_bytes=0, object_store_bytes=0)


def test_more_ranks_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "nodes", lambda: [node(5, 2), node(3, 1)])
    check_devices(3, 1, "cuda")
    check_devices(3, 2, "cpu")
    with pytest.raises(Refusal, match="ranks 4: there are GPUs for 3; use --ranks 3"):
        check_devices(4, 1, "cuda")
    with pytest.raises(Refusal, match="ranks 4: there are CPUs, at 2 a rank, for 3"):
        check_devices(4, 2, "cpu")


class Dying(RankGroup):
    """Ranks that play what `plays` says: events, and "lost" where one of them dies."""

    def __init__(self, plays: list[list[Any]]) -> None:
        self.notes: list[str] = []
        super().__init__(2, on_event=self.notes.append)
        self.plays, self.starts = iter(plays), 0

    def _start(self) -> None:
        self._actors, self.starts = ["an actor"], self.starts + 1

    def _stop(self) -> None:
        self._actors = []

    def _attempt(self, spec: Any) -> Iterator[dict[str, Any]]:
        for act in next(self.plays):
            if isinstance(act, Exception):
                raise act
            yield {"event": act, "rank": 0}


def test_a_death_is_told_and_all_are_started_again() -> None:
    ranks = Dying([["begin", "saved", module._Lost("killed")], ["begin", "done"]])
    assert [event["event"] for event in ranks.train(SPEC)] == ["begin", "saved", "begin", "done"]
    assert ranks.starts == 2 and ranks.notes == ["a rank was lost (killed); all go on from the newest checkpoint"]


def test_deaths_without_a_checkpoint_between_them_end_the_run() -> None:
    deaths = [["begin", module._Lost("killed")]] * (FRUITLESS_RESTARTS + 1)
    with pytest.raises(Refusal, match=f"lost {FRUITLESS_RESTARTS + 1} times with no checkpoint between"):
        list(Dying(deaths).train(SPEC))
    saving = [["begin", "saved", module._Lost("killed")]] * (FRUITLESS_RESTARTS + 1)
    assert list(Dying([*saving, ["done"]]).train(SPEC))[-1]["event"] == "done"


def test_what_ends_before_its_end_ends_the_ranks() -> None:
    ranks = Dying([["begin", "steps"], ["done"]])
    events = ranks.train(SPEC)
    next(events)
    assert ranks._actors
    events.close()
    assert not ranks._actors
    assert [event["event"] for event in ranks.train(SPEC)] == ["done"] and ranks.starts == 2
