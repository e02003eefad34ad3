# The nine published PPO recipes, and GRPO variants of our own; verl_0.9.sh and verl_0.5.sh read it. They set the keys
# that differ between the releases: critic_keys, reward_keys, reward_function and loggers.
#
#   verl_0.9.sh [--grpo] [--print] POLICY DATA [-- VERL_OVERRIDE...]
#
# POLICY is llama3.1-8b, qwen2.5-7b or qwen3-8b; DATA is general, hh-rlhf or math.
# --grpo takes GRPO in place of PPO. Its settings are our own: nobody has published or measured them.
# --print shows the command instead of running it. What follows -- goes to verl, and overrides what is set here.
#
# Required environment variables:
#   REWARD_MODEL    folder of the reward model, after `polar-ft calibrate`
#   REWARD_SERVERS  where it is served: host:port, several separated by commas
#   TRAIN_FILE      Parquet file, from `polar-ft data to-verl`
#   VAL_FILE        the same for validation; math only
# Optional: MODEL (folder or hub id of the policy), OUT (outputs/NAME), NNODES, GPUS_PER_NODE (8).
# For several nodes run it by cluster/ray_node.sh.
# shellcheck shell=bash
# shellcheck disable=SC2154 # the variables of the launcher

stop() { echo "$(basename "$0"): $*" >&2; exit 2; }

algorithm=ppo print='' names=()
while [ $# -gt 0 ]; do
    case $1 in
        --grpo) algorithm=grpo ;;
        --print) print=yes ;;
        --) shift; break ;;
        -*) stop "$1: unknown option; settings of verl stand after --" ;;
        *) names+=("$1") ;;
    esac
    shift
done
[ ${#names[@]} -eq 2 ] ||
    stop "name a policy (llama3.1-8b, qwen2.5-7b, qwen3-8b) and data (general, hh-rlhf, math)"
policy=${names[0]} data=${names[1]}

# InternLM/POLAR, examples/ppo, commit 80626f3.
micro_batch=2 gpu_memory=0.7 batched_tokens=8192
case $policy in
    llama3.1-8b) model=meta-llama/Llama-3.1-8B-Instruct ;;
    qwen2.5-7b) model=Qwen/Qwen2.5-7B-Instruct ;;
    qwen3-8b) model=Qwen/Qwen3-8B micro_batch=1 gpu_memory=0.8 batched_tokens=16384 ;;
    *) stop "$policy: the policy must be llama3.1-8b, qwen2.5-7b or qwen3-8b; MODEL names another folder for it" ;;
esac
case $policy/$data in #   nodes batch prompt response epochs test_freq
    qwen3-8b/general) row=(4    1024  1024   15000    1      -1) ;;
    qwen3-8b/hh-rlhf) row=(2     512   128   16000    5      -1) ;;
    qwen3-8b/math)    row=(4    1024  1024   15000    100     5) ;;
    */general)        row=(1    1024  1024    1024    1      -1) ;;
    */hh-rlhf)        row=(1     512   128     512    5      -1) ;;
    */math)           row=(1    1024  1024    1024    100     5) ;;
    *) stop "$data: the data must be general, hh-rlhf or math" ;;
esac
read -r nodes batch prompt_length response_length epochs test_freq <<< "${row[*]}"
validate=False
if [ "$test_freq" -gt 0 ]; then validate=True; fi

name=${algorithm}_${policy}_${data}
for variable in REWARD_MODEL REWARD_SERVERS TRAIN_FILE; do
    [ -n "${!variable:-}" ] || stop "set $variable; the first lines of verl_recipe.bash say what it is"
done
if [ $validate = False ]; then VAL_FILE=${VAL_FILE:-$TRAIN_FILE}; fi # verl wants one
[ -n "${VAL_FILE:-}" ] || stop "set VAL_FILE: $data validates every $test_freq steps"
MODEL=${MODEL:-$model} NNODES=${NNODES:-$nodes} GPUS_PER_NODE=${GPUS_PER_NODE:-8}
# Ray runs elsewhere, so paths have to be absolute; what is no folder is a hub id.
OUT=$(realpath -m "${OUT:-outputs/$name}") TRAIN_FILE=$(realpath -m "$TRAIN_FILE") VAL_FILE=$(realpath -m "$VAL_FILE")
if [ -d "$MODEL" ]; then MODEL=$(realpath "$MODEL"); fi
if [ -d "$REWARD_MODEL" ]; then REWARD_MODEL=$(realpath "$REWARD_MODEL"); fi
comma="','"
servers="['${REWARD_SERVERS//,/$comma}']"

if [ $algorithm = ppo ]; then
    of_algorithm=(
        algorithm.adv_estimator=gae
        algorithm.gamma=1.0
        algorithm.lam=1.0
        algorithm.kl_ctrl.kl_coef=0
        actor_rollout_ref.actor.use_kl_loss=False
        actor_rollout_ref.rollout.n=1
        "critic.model.path=$(text "$MODEL")"
        critic.model.enable_gradient_checkpointing=True
        critic.model.use_remove_padding=True
        critic.optim.lr=1e-5
        critic.optim.lr_warmup_steps_ratio=0
        critic.optim.min_lr_ratio=0.1
        "critic.ppo_micro_batch_size_per_gpu=$micro_batch"
        "${critic_keys[@]}"
        trainer.critic_warmup=0
    )
else # Ours: as many answers a step as PPO; KL weight of DeepSeekMath (arXiv 2402.03300). Without KL policies hack.
    batch=$((batch / 8))
    of_algorithm=(
        algorithm.adv_estimator=grpo
        algorithm.norm_adv_by_std_in_grpo=True
        actor_rollout_ref.actor.use_kl_loss=True
        actor_rollout_ref.actor.kl_loss_coef=0.04
        actor_rollout_ref.actor.kl_loss_type=low_var_kl
        actor_rollout_ref.rollout.n=8
        actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=32
        actor_rollout_ref.ref.fsdp_config.param_offload=True
    )
fi

command=(
    python3 -m verl.trainer.main_ppo
    "${of_algorithm[@]}"
    algorithm.use_kl_in_reward=False

    "data.train_files=$(text "$TRAIN_FILE")"
    "data.val_files=$(text "$VAL_FILE")"
    data.prompt_key=prompt
    "data.train_batch_size=$batch"
    "data.max_prompt_length=$prompt_length"
    "data.max_response_length=$response_length"
    data.filter_overlong_prompts=True
    data.truncation=error

    "actor_rollout_ref.model.path=$(text "$MODEL")"
    actor_rollout_ref.model.enable_gradient_checkpointing=True
    actor_rollout_ref.model.use_remove_padding=True
    actor_rollout_ref.actor.optim.lr=1e-6
    actor_rollout_ref.actor.optim.lr_warmup_steps_ratio=0.03
    "actor_rollout_ref.actor.ppo_mini_batch_size=$batch"
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=$micro_batch"
    actor_rollout_ref.actor.clip_ratio=0.2
    actor_rollout_ref.rollout.name=vllm
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    "actor_rollout_ref.rollout.gpu_memory_utilization=$gpu_memory"
    "actor_rollout_ref.rollout.max_num_batched_tokens=$batched_tokens"
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=32

    "${reward_keys[@]}"
    "+$reward_function.reward_kwargs.model=$(text "$REWARD_MODEL")"
    "+$reward_function.reward_kwargs.server_address=$servers"
    "+$reward_function.reward_kwargs.watch=$(text "$OUT/watch")"

    "trainer.nnodes=$NNODES"
    "trainer.n_gpus_per_node=$GPUS_PER_NODE"
    "trainer.total_epochs=$epochs"
    trainer.save_freq=100
    "trainer.test_freq=$test_freq"
    "trainer.val_before_train=$validate"
    trainer.project_name=polar
    "trainer.experiment_name=$name"
    "trainer.default_local_dir=$(text "$OUT")"
    "trainer.rollout_data_dir=$(text "$OUT/rollouts")"
    "trainer.logger=[$loggers]"
    "$@"
)

if [ -n "$print" ]; then
    printf '%q' "${command[0]}"
    printf ' \\\n    %q' "${command[@]:1}"
    echo
    exit
fi
[ -e "$TRAIN_FILE" ] || stop "TRAIN_FILE=$TRAIN_FILE: no such file"
[ -e "$VAL_FILE" ] || stop "VAL_FILE=$VAL_FILE: no such file"
if [ ! -e "$REWARD_MODEL/reward_scale.json" ] && [[ "$*" != *reward_kwargs.floor=* ]]; then
    stop "REWARD_MODEL=$REWARD_MODEL: has no reward_scale.json, so answers that never come have no reward;" \
        "run polar-ft calibrate, or give -- +$reward_function.reward_kwargs.floor=NUMBER"
fi
if [ "$NNODES" -gt 1 ] && [ -z "${RAY_ADDRESS:-}" ]; then
    stop "$NNODES nodes need a Ray cluster: run this by cluster/ray_node.sh, or set RAY_ADDRESS"
fi
mkdir -p "$OUT"
if [[ $loggers == *tensorboard* ]]; then export TENSORBOARD_DIR=${TENSORBOARD_DIR:-$OUT/tensorboard}; fi
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False # vLLM's sleep mode refuses them
exec "${command[@]}"
