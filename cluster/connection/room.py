"""Room on the cluster: processes are placed together, and what the scheduler cannot place is refused, after 20 s."""

from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from espalier.stages.errors import Refusal

WAIT_SECONDS = 20.0
WAITING = ("DEPENDENCIES_UNREADY", "PENDING_CREATION", "RESTARTING")
KINDS = ("CPU", "GPU")


def reserved(count: int, bundle: Mapping[str, float], who: str) -> Any:
    """Room for so many processes, each with a `bundle` of resources: all or none, in order, on as few nodes as can be.

    Returns Ray's placement group. Raises Refusal where it is not there after WAIT_SECONDS, with what is free, who has
    the rest and how many there is room for.
    """
    group = placement_group([dict(bundle)] * count, strategy="PACK")
    if not group.wait(WAIT_SECONDS):
        remove_placement_group(group)
        raise Refusal(no_room(f"{count} {who}", bundle))
    return group


def placed(group: Any, number: int) -> PlacementGroupSchedulingStrategy:
    """How an actor asks for bundle `number` of the group."""
    return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)


def answered(references: Any) -> Any:
    """What `ray.get` gives. Raises Refusal where an actor of this run waits for room meanwhile."""
    while True:
        try:
            return ray.get(references, timeout=WAIT_SECONDS)
        except GetTimeoutError:
            refuse_waiting()


def first_of(references: list[Any]) -> Any:
    """The one of them that is answered first. Raises Refusal as `answered` does."""
    while True:
        ready, _ = ray.wait(references, num_returns=1, timeout=WAIT_SECONDS)
        if ready:
            return ready[0]
        refuse_waiting()


def has_room(wanted: Mapping[str, float]) -> bool:
    """Whether a node of the cluster has all of it free now."""
    return any(_fits(wanted, free) for free in _free())


def refuse_waiting() -> None:
    """Raises Refusal if an actor of this run waits for resources that no node has free."""
    job = ray.get_runtime_context().get_job_id()
    waiting = [a for a in _actors() if a["JobID"] == job and a["State"] in WAITING and not a["Address"]["IPAddress"]]
    unmet = [bundle for bundle in map(_plain, _demanded()) if not has_room(bundle)]
    if waiting and unmet:
        raise Refusal(no_room(f"{len(waiting)} of this run's processes", unmet[0]))


def no_room(who: str, wanted: Mapping[str, float]) -> str:
    """What has waited WAIT_SECONDS, for what, what is free, who is at work there, and what to do."""
    free = "; ".join(_text(node) for node in _free())
    held: dict[str, int] = {}
    for actor in _actors():
        if actor["State"] == "ALIVE":
            name = f"{actor['ActorClassName']} of job {actor['JobID']}"
            held[name] = held.get(name, 0) + 1
    holders = ", ".join(f"{count} {name}" for name, count in held.items())
    return (
        f"{who} had to wait {WAIT_SECONDS:.0f} s for room on the cluster: each asks for {_text(wanted)}, free on its "
        f"nodes: {free}{f' (at work: {holders})' if holders else ''}, room for {_fitting(wanted)}; let the others end, "
        "use fewer --shards or --ranks or --threads, or add nodes"
    )


def _fitting(wanted: Mapping[str, float]) -> int:
    """How many such processes there is room for now."""
    asked = {kind: amount for kind, amount in wanted.items() if amount}
    return sum(int(min(free.get(kind, 0.0) // amount for kind, amount in asked.items())) for free in _free())


def _plain(wanted: Mapping[str, float]) -> dict[str, float]:
    """What a bundle of a placement group asks for, whose resources are named after the group as well."""
    plain = {kind.partition("_group_")[0]: amount for kind, amount in wanted.items()}
    return {kind: plain[kind] for kind in KINDS if kind in plain}


def _text(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{resources.get(kind, 0):g} {kind}" for kind in KINDS if kind == "CPU" or kind in resources)


def _fits(wanted: Mapping[str, float], free: Mapping[str, float]) -> bool:
    return all(free.get(kind, 0.0) >= amount for kind, amount in wanted.items())


def _free() -> list[dict[str, float]]:
    from ray._private.state import available_resources_per_node

    return list(available_resources_per_node().values())


def _actors() -> list[dict[str, Any]]:
    from ray._private.state import state

    return list(state.actor_table(None).values())


def _demanded() -> list[dict[str, float]]:
    """What tasks and actors of the whole cluster ask for and have not got."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    demands = get_cluster_status(ray.get_runtime_context().gcs_address).resource_demands.ray_task_actor_demand
    return [dict(request.bundle) for demand in demands for request in demand.bundles_by_count]
