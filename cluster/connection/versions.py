"""What the nodes' Python has installed, held against the driver's: other versions would give other bytes, or no run."""

import hashlib
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from espalier.cluster.connection.room import answered
from espalier.stages.errors import Refusal

LIBRARIES = ("torch", "transformers", "ray")
DIGITS = 8  # of the digest of Espalier's code
MISSING = "not installed"


def versions_here() -> dict[str, str]:
    """Of this process: Espalier's code by its digest, Python's minor version, and the libraries that compute.

    Builds of one version (2.13.0+cpu, 2.13.0+cu128) count as the same: a head without a GPU may drive nodes with some.
    """
    found = {"espalier": _digest(), "Python": ".".join(platform.python_version_tuple()[:2])}
    for name in LIBRARIES:
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = MISSING
    return found


def check_nodes() -> None:
    """Returns if every node of the connected cluster that may run a shard has the versions of this process.

    Raises Refusal with the node, both versions and the remedy otherwise, before anything of ours is run there.
    """
    # By value: it must run where another Espalier is installed, without this module, or none.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    tell = ray.remote(num_cpus=0)(_told)
    nodes = [entry["NodeID"] for entry in ray.nodes() if entry["Alive"] and entry["Resources"].get("CPU")]
    places = [NodeAffinitySchedulingStrategy(node, soft=True) for node in nodes]
    refuse_others(answered([tell.options(scheduling_strategy=place).remote() for place in places]))


def refuse_others(told: Iterable[tuple[str, Mapping[str, str]]]) -> None:
    """Returns if all nodes (address, its versions) have those of this process; raises Refusal at the first other."""
    ours = versions_here()
    for node, theirs in told:
        others = [name for name in ours if theirs.get(name, MISSING) != ours[name]]
        if others:
            there = ", ".join(f"{name} {theirs.get(name, MISSING)}" for name in others)
            here = ", ".join(f"{name} {ours[name]}" for name in others)
            raise Refusal(
                f"node {node} has {there}, and this process {here}: the result would depend on who works at it; "
                "install the same on both, or give every node the same image"
            )


def _told() -> tuple[str, dict[str, str]]:
    return ray.util.get_node_ip_address(), versions_here()


def _digest() -> str:
    """`code` and some digits of a digest over the names and bytes of Espalier's Python files."""
    spec = find_spec("espalier")
    if spec is None or spec.origin is None:
        return MISSING
    digest, root = hashlib.sha256(), Path(spec.origin).parent
    files = [Path(place, name) for place, _, names in os.walk(root, followlinks=True) for name in names]
    for file in sorted(file for file in files if file.suffix == ".py"):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes() + b"\0")
    return f"code {digest.hexdigest()[:DIGITS]}"
