#!/usr/bin/env bash
# Trains a policy in verl 0.9 with POLAR's rewards: the nine published PPO recipes, and GRPO variants of our own.
#
#   verl_0.9.sh [--grpo] [--print] POLICY DATA [-- VERL_OVERRIDE...]
#
# The first lines of verl_recipe.bash say what they are, and what has to be set.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# A text in quotes that hydra reads, whatever characters it has.
text() { printf "'%s'" "${1//\'/\\\'}"; }

critic_keys=(
    critic.optim.lr_scheduler_type=cosine
    critic.fsdp.param_offload=False
    critic.fsdp.optimizer_offload=False
)
# The older keys custom_reward_function.* and reward_model.* are accepted in 0.9, and main_ppo ignores them.
reward_function=reward.custom_reward_function
reward_keys=(
    reward.reward_manager.name=naive
    "$reward_function.path=pkg://polar_ft.rft.verl"
    "$reward_function.name=compute_score"
)
loggers=console,tensorboard

# shellcheck source=verl_recipe.bash
. "$here/verl_recipe.bash"
