#!/usr/bin/env bash
# Serves the reward model on this machine, one server for each of its GPUs. Ends, with an error, when one of them does.
#
#   serve_rewards.sh
#
# Required: REWARD_MODEL. Optional: REWARD_GPUS (0; several separated by commas), REWARD_PORT (30000; that of the first
# GPU, the others have the following ones), REWARD_HOST (127.0.0.1), ENGINE (polar-ft, vllm or sglang), POLAR_FT (the
# command polar-ft, if it is not on PATH).
# polar-ft listens on other addresses than 127.0.0.1 only with POLAR_API_KEY set, here and where policies are trained.
set -euo pipefail

: "${REWARD_MODEL:?set it to the folder of the reward model}"
host=${REWARD_HOST:-127.0.0.1}
port=${REWARD_PORT:-30000}
trap 'jobs -p | xargs -r kill 2>/dev/null || true' EXIT
trap 'exit 143' INT TERM

IFS=, read -ra gpus <<< "${REWARD_GPUS:-0}"
for gpu in "${gpus[@]}"; do
    case ${ENGINE:-polar-ft} in
        polar-ft) server=("${POLAR_FT:-polar-ft}" serve "$REWARD_MODEL" --host "$host" --port "$port") ;;
        vllm)
            server=(vllm serve "$REWARD_MODEL" --runner pooling --trust-remote-code --max-model-len 16384
                --host "$host" --port "$port")
            ;;
        sglang)
            server=(python3 -m sglang.launch_server --model-path "$REWARD_MODEL" --trust-remote-code --is-embedding
                --host "$host" --port "$port")
            ;;
        *) echo "ENGINE=$ENGINE: must be polar-ft, vllm or sglang" >&2; exit 2 ;;
    esac
    CUDA_VISIBLE_DEVICES=$gpu "${server[@]}" &
    port=$((port + 1))
done

wait -n || true
echo "serve_rewards.sh: a reward server has ended; its last lines say why" >&2
exit 1
