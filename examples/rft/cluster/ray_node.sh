#!/usr/bin/env bash
# Makes a Ray cluster and runs a command on it: start this on every node. The first node runs the command.
#
#   ray_node.sh COMMAND...
#
# Required: HEAD (name or address of the first node), NODE_RANK (0 on the first) and NNODES; the last two come from
# SLURM where it starts this. Optional: GPUS_PER_NODE (8), RAY_PORT (6379), WAIT_SECONDS (1800).
# Its status is that of the command on the first node; the others end when the first does. Ray has no other user on
# these machines: at the end `ray stop` ends all of it.
set -euo pipefail

rank=${NODE_RANK:-${SLURM_NODEID:-}}
export NNODES=${NNODES:-${SLURM_STEP_NUM_NODES:-}}
: "${HEAD:?set it to the name or address of the first node}"
: "${rank:?set NODE_RANK to the number of this node, from 0}"
: "${NNODES:?set it to the number of nodes}"
[ $# -gt 0 ] || { echo "ray_node.sh: name the command to run" >&2; exit 2; }
port=${RAY_PORT:-6379}
start=(ray start --num-gpus "${GPUS_PER_NODE:-8}" --disable-usage-stats)

# Repeats a command until it succeeds.
wait_for() {
    until "$@"; do
        if [ "$SECONDS" -ge "${WAIT_SECONDS:-1800}" ]; then
            echo "ray_node.sh: node $rank gave up after ${WAIT_SECONDS:-1800} s: $*" >&2
            exit 1
        fi
        sleep 2
    done
}
head_is_up() { ray health-check --address "$HEAD:$port" > /dev/null 2>&1; }
all_nodes_are_up() {
    local count='import ray; ray.init(logging_level="ERROR"); print(sum(node["Alive"] for node in ray.nodes()))'
    [ "$(python3 -c "$count")" -ge "$NNODES" ]
}

trap 'ray stop || true' EXIT
trap 'exit 143' INT TERM
if [ "$rank" -eq 0 ]; then
    "${start[@]}" --head --port "$port"
    export RAY_ADDRESS=auto
    wait_for all_nodes_are_up
    "$@"
    exit
fi
wait_for head_is_up
"${start[@]}" --address "$HEAD:$port"
misses=0 # a busy head may miss a check; after three in a row it is gone
while [ "$misses" -lt 3 ]; do
    sleep "${CHECK_SECONDS:-10}"
    if head_is_up; then misses=0; else misses=$((misses + 1)); fi
done
