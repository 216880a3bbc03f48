"""Holds a head and a second raylet on this machine and does what its standard input says; ends with its input.

A process of its own, so that a test process that dies, by whatever signal, closes the input and takes the cluster
along. Usage: two_raylets.py HOME CPUS. Prints one JSON object a line: at the start, and after each command.
Commands: "kill N" (SIGKILL to raylet N, 0 is the head's), "add" (one more raylet).
"""

import json
import os
import secrets
import shutil
import socket
import sys
from pathlib import Path

OBJECT_STORE_BYTES = 200_000_000


def main(home: Path, cpus: int) -> None:
    token_path = home / "token"
    token_path.touch(0o600)
    token_path.write_text(secrets.token_hex(32))
    os.environ.update(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(token_path),
        RAY_USAGE_STATS_ENABLED="0",
        RAY_health_check_period_ms="500",  # for 3000: a raylet that is killed is missed after five of them
        RAY_TMPDIR=str(home),  # keeps "the latest cluster" of this user's /tmp/ray as it is
    )
    from ray.cluster_utils import Cluster

    # Agents choose their ports: another cluster on this machine may hold the default one, and jobs need an agent.
    shape = {"num_cpus": cpus, "object_store_memory": OBJECT_STORE_BYTES, "dashboard_agent_listen_port": 0}
    head = {"include_dashboard": True, "dashboard_port": free_port(), "no_monitor": True, "include_log_monitor": False}
    head |= {"temp_dir": str(home / "ray")}
    cluster = Cluster(initialize_head=True, head_node_args={**shape, **head})
    try:
        raylets = [cluster.head_node, cluster.add_node(**shape)]
        tell(
            {"address": cluster.address, "dashboard_url": f"http://{cluster.webui_url}", "token_path": str(token_path)}
        )
        for line in sys.stdin:
            command, *number = line.split()
            if command == "kill":
                raylets[int(number[0])].kill_raylet(check_alive=False)
            else:
                raylets.append(cluster.add_node(**shape))
            tell({"done": line.strip(), "raylets": len(raylets)})
    finally:
        cluster.shutdown()
        shutil.rmtree(home, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def tell(message: dict[str, object]) -> None:
    print(json.dumps(message), file=ANSWERS, flush=True)


if __name__ == "__main__":
    ANSWERS = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray's own chatter goes to the log, not between the answers
    main(Path(sys.argv[1]), int(sys.argv[2]))
