#!/usr/bin/env bash
# One machine: the reward model on some GPUs, the policy on the others.
#
#   POLICY_GPUS=0,1,2,3 REWARD_GPUS=4,5,6,7 beside.sh COMMAND...
#   POLICY_GPUS=0,1,2,3 REWARD_GPUS=4,5,6,7 beside.sh examples/rft/verl_0.9.sh qwen2.5-7b general
#
# COMMAND starts when every reward server answers and has passed the parity check, sees only the policy's GPUs, and
# finds REWARD_SERVERS and GPUS_PER_NODE set. Required and optional: as in serve_rewards.sh and wait_for_rewards.sh.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${POLICY_GPUS:?set it to the GPUs of the policy, such as 0,1,2,3}"
: "${REWARD_GPUS:?set it to the GPUs of the reward model, such as 4,5,6,7}"
[ $# -gt 0 ] || { echo "beside.sh: name the command that trains" >&2; exit 2; }

IFS=, read -ra policy <<< "$POLICY_GPUS"
IFS=, read -ra rewards <<< "$REWARD_GPUS"
for gpu in "${policy[@]}"; do
    [[ ",$REWARD_GPUS," != *",$gpu,"* ]] || { echo "beside.sh: GPU $gpu is in both lists" >&2; exit 2; }
done
servers=()
for i in "${!rewards[@]}"; do servers+=("127.0.0.1:$((${REWARD_PORT:-30000} + i))"); done
REWARD_SERVERS=$(IFS=,; echo "${servers[*]}")
export REWARD_SERVERS REWARD_GPUS
export GPUS_PER_NODE=${#policy[@]}

trap 'jobs -p | xargs -r kill 2>/dev/null || true' EXIT
trap 'exit 143' INT TERM
"$here/serve_rewards.sh" &
serving=$!
export CUDA_VISIBLE_DEVICES=$POLICY_GPUS
"$here/wait_for_rewards.sh" &
wait -n "$serving" $! # that of serve_rewards.sh is never 0
"$@" &
wait -n "$serving" $!
