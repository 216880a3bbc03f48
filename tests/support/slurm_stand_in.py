"""A stand-in for Slurm's `srun` and `scontrol` on this machine: nodes with addresses of their own in network namespaces
where they are allowed, else several Ray nodes of one machine."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SRUN = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift; done
pids=()
for rank in $(seq 0 $((SLURM_NNODES - 1))); do
    SLURM_NODEID=$rank SLURM_PROCID=$rank SLURM_CPUS_ON_NODE=2 stand-in-node "$rank" "$@" &
    pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM
worst=0
for pid in "${pids[@]}"; do
    while :; do
        wait "$pid" && code=0 || code=$?
        kill -0 "$pid" 2>/dev/null || break
    done
    [ $code -le $worst ] || worst=$code
done
exit $worst
"""
# In a namespace a node has its own /tmp/ray and /dev/shm too, as a machine has: Ray keeps its node's address there.
IN_NAMESPACE = """#!/usr/bin/env bash
rank=$1; shift
exec ip netns exec "{name}$rank" bash -c \\
    'mount -t tmpfs none /tmp/ray && mount -t tmpfs none /dev/shm && exec "$@"' bash "$@"
"""
HERE = """#!/usr/bin/env bash
shift
exec "$@"
"""


@dataclass(frozen=True)
class SlurmStandIn:
    """`environment` has PATH and the variables of a job; `addresses` are the nodes', equal ones without namespaces."""

    environment: dict[str, str]
    addresses: list[str]
    namespaces: list[str]

    def processes(self) -> list[int]:
        """Ids of what runs on the nodes; none can be told without namespaces."""
        listed = [_ran("ip", "netns", "pids", name) for name in self.namespaces]
        return [int(pid) for text in listed for pid in text.split()]


@contextlib.contextmanager
def slurm_stand_in(folder: Path, home: Path, venv: Path) -> Iterator[SlurmStandIn]:
    """Two nodes of a job that is submitted from `home`, the checkout; its commands are files in `folder`."""
    name = f"esp{os.getpid()}n"
    with contextlib.ExitStack() as held:
        namespaces = [f"{name}0", f"{name}1"]
        addresses = ["10.213.77.1", "10.213.77.2"]
        try:
            _connected(held, namespaces, addresses)
            node = IN_NAMESPACE.format(name=name)
        except (OSError, subprocess.CalledProcessError):
            held.close()
            namespaces, addresses, node = [], ["127.0.0.1", "127.0.0.1"], HERE
        scripts = {
            "srun": SRUN,
            "stand-in-node": node,
            "scontrol": f"#!/bin/sh\nprintf '%s\\n' {' '.join(addresses)}\n",
        }
        for command, text in scripts.items():
            (folder / command).write_text(text)
            (folder / command).chmod(0o755)
        Path("/tmp/ray").mkdir(exist_ok=True)
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SLURM_"))}
        yield SlurmStandIn(
            kept
            | {
                "PATH": f"{folder}:{os.environ['PATH']}",
                "HOME": str(folder),
                "SLURM_JOB_ID": str(os.getpid()),
                "SLURM_NNODES": "2",
                "SLURM_JOB_NODELIST": "node[0-1]",
                "SLURM_SUBMIT_DIR": str(home),
                "ESPALIER_VENV": str(venv),
                "RAY_START_OPTIONS": "--object-store-memory=100000000"
                + ("" if namespaces else " --dashboard-agent-listen-port=0"),
            },
            addresses,
            namespaces,
        )


def _connected(held: contextlib.ExitStack, namespaces: list[str], addresses: list[str]) -> None:
    """Two network namespaces with a cable between them. Raises CalledProcessError where they are not allowed."""
    for name in namespaces:
        _ran("ip", "netns", "add", name)
        held.callback(_ran, "ip", "netns", "del", name)
    first, second = (f"v{name[3:]}" for name in namespaces)
    _ran(*f"ip link add {first} netns {namespaces[0]} type veth peer name {second} netns {namespaces[1]}".split())
    for name, link, address in zip(namespaces, (first, second), addresses, strict=True):
        for line in (f"addr add {address}/24 dev {link}", f"link set {link} up", "link set lo up"):
            _ran("ip", "-n", name, *line.split())


def _ran(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
