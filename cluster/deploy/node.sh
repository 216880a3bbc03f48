#!/usr/bin/env bash
# One node of a Ray cluster that lives as long as one espalier command. Started on every node at once:
#
#     node.sh RANK NODES HEAD prune /data/llama --output /data/llama-50 --calibration /data/text.txt
#
# RANK is this node's number from 0, NODES how many there are, HEAD the name or address of node 0. Node 0 waits until all
# have joined, runs the command and ends with its exit code; the others end when node 0 does. `python` and `ray` on PATH
# are those of the environment that espalier is installed in, the same on every node.
#
#     RAY_AUTH_TOKEN_PATH   a file with the cluster's token, the same on every node, readable by its owner alone
#     RAY_PORT              of the head; 6379 if not given
#     RAY_CPUS, RAY_GPUS    what Ray may use of this node; what it finds if not given
#     RAY_START_OPTIONS     more options for `ray start`, such as --object-store-memory=20000000000
#     JOIN_SECONDS          how long nodes wait for one another; 300 if not given
set -euo pipefail

fail() {
    echo "node.sh: $1" >&2
    exit 2
}

[ $# -ge 4 ] || fail "give RANK, NODES, HEAD and an espalier command"
rank=$1 nodes=$2 head=$3
shift 3
port=${RAY_PORT:-6379} patience=${JOIN_SECONDS:-300}
[ -s "${RAY_AUTH_TOKEN_PATH:-}" ] ||
    fail "RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-} names no file with a token; \`ray get-auth-token --generate\` makes one"
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

# The head's address, and this node's on the way to it. A node may know itself by a loopback name, which no other can reach.
addresses=$(python - "$head" <<'PYTHON'
import socket, sys
way = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
way.connect((sys.argv[1], 9))
if way.getpeername()[0].startswith("127.") and sys.argv[1] != "127.0.0.1":
    way.connect(("192.0.2.1", 9))
    print(way.getsockname()[0], way.getsockname()[0])
else:
    print(way.getpeername()[0], way.getsockname()[0])
PYTHON
) || fail "HEAD $head: no address of that name"
read -r head here <<<"$addresses"

head_answers() {
    timeout 5 bash -c "exec 3<>/dev/tcp/$head/$port" 2>/dev/null
}

trap 'exit 143' TERM
trap 'exit 130' INT
if [ "$rank" = 0 ]; then
    role=(--head "--port=$port" --dashboard-host=127.0.0.1)
else
    role=("--address=$head:$port")
    until head_answers; do
        [ $SECONDS -lt "$patience" ] || fail "no Ray at $head:$port for $patience s; look at the output of node 0"
        sleep 1
    done
fi
# In a session of its own: a signal for the whole step ends the command first, and Ray when that has said its last word.
# shellcheck disable=SC2086
setsid ray start --block --disable-usage-stats "--node-ip-address=$here" "${role[@]}" \
    ${RAY_CPUS:+"--num-cpus=$RAY_CPUS"} ${RAY_GPUS:+"--num-gpus=$RAY_GPUS"} ${RAY_START_OPTIONS:-} >&2 &
node=$!
# At the end all of it: Ray's agents, which are in its group, would look for a head that is gone for up to a minute.
trap 'kill -TERM "$node" 2>/dev/null; wait "$node" || true; kill -KILL -- "-$node" 2>/dev/null || true' EXIT

if [ "$rank" != 0 ]; then
    silent=0
    while [ $silent -lt 3 ]; do
        if head_answers; then
            silent=0
            kill -0 "$node" 2>/dev/null || fail "Ray ended on this node, and the head goes on without it"
        else
            silent=$((silent + 1))
        fi
        sleep 2 &
        wait $!
    done
    exit 0
fi

export RAY_ADDRESS="$head:$port"
until head_answers; do
    kill -0 "$node" 2>/dev/null || fail "Ray's head ended before it had begun; its last words are above"
    sleep 1
done
python - "$nodes" "$patience" <<'PYTHON'
import sys, time
import ray
ray.init(log_to_driver=False, logging_level="ERROR")
wanted, give_up = int(sys.argv[1]), time.monotonic() + float(sys.argv[2])
while (there := sum(node["Alive"] for node in ray.nodes())) < wanted:
    if time.monotonic() > give_up:
        sys.exit(f"node.sh: {there} of {wanted} nodes joined within {sys.argv[2]} s; look at the output of the others")
    time.sleep(1)
PYTHON

python -m espalier "$@" &
command=$!
trap 'kill -TERM "$command" 2>/dev/null' TERM INT
code=0
while :; do
    wait "$command" && code=0 || code=$?
    kill -0 "$command" 2>/dev/null || break # else: a signal came, which the command was told
done
exit "$code"
