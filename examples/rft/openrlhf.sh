#!/usr/bin/env bash
# Trains a policy in OpenRLHF 0.11 with GRPO and POLAR's rewards. Settings are our own, neither published nor
# measured; option names were checked against OpenRLHF's source, and OpenRLHF was not run.
#
#   openrlhf.sh [--print] [-- OPENRLHF_OPTION...]
#
# Required environment variables:
#   MODEL           folder or hub id of the policy
#   REWARD_MODEL    folder of the reward model, after `polar-ft calibrate`
#   REWARD_SERVERS  where it is served: host:port, several separated by commas
#   TRAIN_FILE      JSONL file, from `polar-ft data to-openrlhf`
# Optional: OUT (outputs/openrlhf), NNODES (1), GPUS_PER_NODE (8), WATCH (OUT/watch).
# For several nodes run it by cluster/ray_node.sh. REWARD_* and WATCH must be set where Ray is started.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
stop() { echo "$(basename "$0"): $*" >&2; exit 2; }

print=''
while [ $# -gt 0 ]; do
    case $1 in
        --print) print=yes ;;
        --) shift; break ;;
        *) stop "$1: unknown; options of OpenRLHF stand after --" ;;
    esac
    shift
done
for variable in MODEL REWARD_MODEL REWARD_SERVERS TRAIN_FILE; do
    [ -n "${!variable:-}" ] || stop "set $variable; the first lines of this file say what it is"
done
NNODES=${NNODES:-1} GPUS_PER_NODE=${GPUS_PER_NODE:-8}
OUT=$(realpath -m "${OUT:-outputs/openrlhf}") TRAIN_FILE=$(realpath -m "$TRAIN_FILE")
if [ -d "$REWARD_MODEL" ]; then REWARD_MODEL=$(realpath "$REWARD_MODEL"); fi
export REWARD_MODEL REWARD_SERVERS
export WATCH=${WATCH:-$OUT/watch}

command=(
    python3 -m openrlhf.cli.train_ppo_ray
    --actor.model_name_or_path "$MODEL"
    --reward.remote_url "$here/openrlhf_reward.py"
    # OpenRLHF cuts rewards to -10 … 10 by default; POLAR's wrong answers, and the floor, lie below.
    --reward.clip_range -1000 1000

    --data.prompt_dataset "$TRAIN_FILE"
    --data.input_key input
    --data.label_key label
    --data.apply_chat_template
    --data.max_len 2048
    --rollout.max_new_tokens 1024

    --algo.advantage.estimator group_norm
    --algo.kl.use_loss
    --algo.kl.estimator k3
    --algo.kl.init_coef 0.04
    --actor.adam.lr 1e-6
    --actor.eps_clip 0.2
    --rollout.n_samples_per_prompt 8
    --rollout.batch_size 128
    --train.batch_size 1024
    --train.num_episodes 1
    --rollout.micro_batch_size 8
    --train.micro_batch_size 2

    --actor.num_nodes "$NNODES"
    --actor.num_gpus_per_node "$GPUS_PER_NODE"
    --ref.num_nodes "$NNODES"
    --ref.num_gpus_per_node "$GPUS_PER_NODE"
    --vllm.num_engines "$((NNODES * GPUS_PER_NODE))"
    --vllm.tensor_parallel_size 1
    --vllm.gpu_memory_utilization 0.6
    --train.colocate_all
    --vllm.enable_sleep
    --ds.enable_sleep
    --ds.zero_stage 3
    --ds.param_dtype bf16
    --ds.packing_samples
    --actor.gradient_checkpointing_enable

    --ckpt.output_dir "$OUT"
    --ckpt.path "$OUT/checkpoints"
    --ckpt.save_steps 100
    --ckpt.save_hf
    --logger.tensorboard_dir "$OUT/tensorboard"
    "$@"
)

if [ -n "$print" ]; then
    printf '%q' "${command[0]}"
    printf ' \\\n    %q' "${command[@]:1}"
    echo
    exit
fi
[ -e "$TRAIN_FILE" ] || stop "TRAIN_FILE=$TRAIN_FILE: no such file"
[ -e "$REWARD_MODEL/reward_scale.json" ] ||
    stop "REWARD_MODEL=$REWARD_MODEL: has no reward_scale.json; run polar-ft calibrate on it"
mkdir -p "$OUT"
exec "${command[@]}"
