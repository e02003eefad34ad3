#!/usr/bin/env bash
# Waits until every reward server answers, then checks that its rewards are those of training (`polar-ft parity`).
#
#   wait_for_rewards.sh [--no-parity | PARITY_OPTION...]
#
# Required: REWARD_MODEL, REWARD_SERVERS (host:port, several separated by commas).
# Optional: WAIT_SECONDS (1800), POLAR_FT (polar-ft; that of an environment with torch, since parity loads the model:
# on the GPUs of the policy, which are free before training).
set -euo pipefail

: "${REWARD_MODEL:?set it to the folder of the reward model}"
: "${REWARD_SERVERS:?set it to host:port of the reward servers, separated by commas}"
IFS=', ' read -ra servers <<< "$REWARD_SERVERS"
# As the client does it: requests to this machine bypass any proxy.
direct=127.0.0.1,localhost,${no_proxy:-${NO_PROXY:-}}

for server in "${servers[@]}"; do
    until curl --silent --fail --output /dev/null --max-time 5 --noproxy "$direct" "http://$server/health"; do
        if [ "$SECONDS" -ge "${WAIT_SECONDS:-1800}" ]; then
            echo "wait_for_rewards.sh: $server did not answer within ${WAIT_SECONDS:-1800} s" >&2
            exit 1
        fi
        sleep 2
    done
    echo "reward server $server answers"
done
if [ "${1-}" = --no-parity ]; then exit; fi

options=()
for server in "${servers[@]}"; do options+=(--server "$server"); done
exec "${POLAR_FT:-polar-ft}" parity "$REWARD_MODEL" "${options[@]}" "$@"
