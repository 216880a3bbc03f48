"""ZeRO ranks as Ray actors: one process each, placed together, used for one training run after the other.

A rank that dies takes its group with it, for a collective operation has no way back. All are started anew, and each
goes on from the run's newest checkpoint.
"""

import os
import socket
from collections.abc import Callable, Generator, Iterator
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import remove_placement_group

from espalier.cluster.arithmetic import steady_products
from espalier.cluster.connection.inventory import nodes
from espalier.cluster.connection.room import placed, reserved
from espalier.cluster.losses import ending_with_its_device
from espalier.stages.errors import Refusal, first_line
from espalier.stages.training.spec import RetrainSpec

FRUITLESS_RESTARTS = 3  # in a row, with no checkpoint between them, before the run gives up
FALLEN_SECONDS = 15.0  # how long after one rank's failure another's death may come to light

Event = dict[str, Any]


class _Lost(Exception):
    """A rank died."""


class RankWorker:
    """What a rank's process does; `ranks.RankGroup` runs several as Ray actors."""

    def __init__(self, threads: int, device: str) -> None:
        steady_products()
        torch.set_num_threads(threads)
        self._device = device

    def facts(self) -> dict[str, Any]:
        """Where this rank lives, and a port that is free there."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            port = listener.getsockname()[1]
        return {"node": ray.util.get_node_ip_address(), "pid": os.getpid(), "port": port}

    def join(self, address: str, rank: int, ranks: int) -> None:
        from espalier.stages.training.engine import join

        join("nccl" if self._device == "cuda" else "gloo", address, rank, ranks)

    def train(self, spec: RetrainSpec) -> Iterator[Event]:
        from espalier.stages.device_errors import out_of_memory_refused
        from espalier.stages.training.rank import train

        less = "use a smaller --microbatch, --activation-checkpointing, a higher --zero-stage, --offload or more ranks"
        with ending_with_its_device(), out_of_memory_refused(f"training on {self._device}", less):
            yield from train(spec, self._device)


class RankGroup:
    """So many ranks on the connected cluster. A context manager: on leaving, they are ended.

    Raises Refusal, on entering, for more ranks than there are devices.
    """

    def __init__(
        self,
        ranks: int,
        *,
        threads: int = 1,
        device: str = "cpu",
        on_event: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.ranks, self.threads, self.device = ranks, threads, device
        self.on_event = on_event
        self._actors: list[Any] = []
        self._group: Any = None
        self.facts: list[dict[str, Any]] = []  # of each rank: node, pid

    def __enter__(self) -> "RankGroup":
        check_devices(self.ranks, self.threads, self.device)
        self._start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def train(self, spec: RetrainSpec) -> Generator[Event, None, None]:
        """What the ranks tell while they train as `spec` says (see `espalier.stages.training.rank.train`).

        After a death the run goes on from its newest checkpoint, so steps since then are told again. One that closes
        this before its end ends the ranks too; the next run starts them anew.
        """
        fruitless = 0
        while True:
            try:
                if not self._actors:
                    self._start()
                for event in self._attempt(spec):
                    if event["event"] == "saved":
                        fruitless = 0
                    yield event
                return
            except _Lost as loss:
                fruitless += 1
                self._stop()
                if fruitless > FRUITLESS_RESTARTS:
                    raise Refusal(
                        f"a rank was lost {fruitless} times with no checkpoint between ({loss}); likely out of "
                        "memory: use more ranks, a higher --zero-stage, --offload or a smaller --microbatch"
                    ) from None
                self.on_event(f"a rank was lost ({loss}); all go on from the newest checkpoint")
            except BaseException:
                self._stop()  # the others wait for one that has failed
                raise

    def _attempt(self, spec: RetrainSpec) -> Iterator[Event]:
        running: list[Any] = [actor.train.options(num_returns="streaming").remote(spec) for actor in self._actors]
        while running:
            ready = _first_ready(running, None)
            try:
                yield ray.get(next(ready))
            except StopIteration:
                running.remove(ready)
            except (RayActorError, RayTaskError) as error:
                self._explain(error, [stream for stream in running if stream is not ready])

    def _explain(self, error: Exception, others: list[Any]) -> None:
        """Raise what is behind one rank's failure: another's death shows itself as a broken connection first."""
        if isinstance(error, RayActorError):
            raise _Lost(first_line(error)) from None
        cause = getattr(error, "cause", None)
        if isinstance(cause, Refusal):
            raise cause from None
        while others and (ready := _first_ready(others, FALLEN_SECONDS)) is not None:
            try:
                ray.get(next(ready))
            except RayActorError as death:
                raise _Lost(first_line(death)) from None
            except (StopIteration, RayTaskError):
                others.remove(ready)
        raise error

    # -- processes -------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        bundle = {"CPU": float(self.threads)} | ({"GPU": 1.0} if self.device == "cuda" else {})
        self._group = reserved(self.ranks, bundle, "ranks")
        variables = {"DS_ACCELERATOR": self.device, "OMP_NUM_THREADS": str(self.threads)}
        variables |= {"LOCAL_RANK": "0"}  # a rank sees no GPU but its own
        self._actors = [
            ray.remote(RankWorker)
            .options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                runtime_env={"env_vars": variables | {"RANK": str(rank), "WORLD_SIZE": str(self.ranks)}},
                scheduling_strategy=placed(self._group, rank),
            )
            .remote(self.threads, self.device)
            for rank in range(self.ranks)
        ]
        try:
            self.facts = ray.get([actor.facts.remote() for actor in self._actors])
            address = f"tcp://{self.facts[0]['node']}:{self.facts[0]['port']}"
            ray.get([actor.join.remote(address, rank, self.ranks) for rank, actor in enumerate(self._actors)])
        except BaseException as error:
            self._stop()
            if isinstance(error, RayTaskError) and isinstance(error.cause, Refusal):
                raise error.cause from None
            raise

    def release(self) -> None:
        """End the processes, and give back what they hold of the cluster; the next run starts them anew."""
        self._stop()

    def _stop(self) -> None:
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        if self._group is not None:
            remove_placement_group(self._group)
        self._actors, self._group = [], None


def check_devices(ranks: int, threads: int, device: str) -> None:
    """Raises Refusal for more ranks than the connected cluster has devices."""
    members = nodes()
    if device == "cuda":
        room, what = sum(int(node.gpus) for node in members), "GPUs"
    else:
        room, what = sum(int(node.cpus // threads) for node in members), f"CPUs, at {threads} a rank,"
    if ranks > room:
        raise Refusal(f"ranks {ranks}: there are {what} for {room}; use --ranks {room}, or a larger cluster")


def _first_ready(streams: list[Any], timeout: float | None) -> Any:
    """One of the generators that has something to say; None if none has in time."""
    ready, _ = ray.wait(streams, num_returns=1, timeout=timeout)
    return ready[0] if ready else None
