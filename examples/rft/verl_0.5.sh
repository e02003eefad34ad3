#!/usr/bin/env bash
# Trains a policy in verl 0.5 with POLAR's rewards: the nine published PPO recipes, and GRPO variants of our own.
#
#   verl_0.5.sh [--grpo] [--print] POLICY DATA [-- VERL_OVERRIDE...]
#
# The first lines of verl_recipe.bash say what they are, and what has to be set.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# A text in quotes that hydra reads, whatever characters it has.
text() { printf "'%s'" "${1//\'/\\\'}"; }

critic_keys=(
    critic.optim.warmup_style=cosine
    critic.model.fsdp_config.param_offload=False
    critic.model.fsdp_config.optimizer_offload=False
)
reward_function=custom_reward_function
reward_keys=(
    reward_model.enable=False
    reward_model.reward_manager=batch
    "$reward_function.path=$(text "$here/verl_reward.py")"
    "$reward_function.name=compute_score_batch"
)
loggers=console

# shellcheck source=verl_recipe.bash
. "$here/verl_recipe.bash"
