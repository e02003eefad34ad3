"""Composes overrides by hydra against the installed verl, and has verl's own code validate the result."""

import importlib.metadata
import json
import sys
from pathlib import Path
from types import SimpleNamespace

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from verl.utils.config import omega_conf_to_dataclass

VERSION = tuple(map(int, importlib.metadata.version("verl").split(".")[:2]))

folder = Path(sys.argv[1])
given = json.loads((folder / "given.json").read_text())


def validate(config):
    """What verl checks before it starts Ray's workers."""
    omega_conf_to_dataclass(config.algorithm)
    if VERSION >= (0, 9):
        from verl.trainer.ppo.utils import need_critic, need_reference_policy
        from verl.utils.config import validate_config

        validate_config(
            config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config)
        )
    else:
        from verl.trainer.ppo.ray_trainer import RayPPOTrainer

        kl = config.actor_rollout_ref.actor.use_kl_loss or config.algorithm.use_kl_in_reward
        trainer = SimpleNamespace(
            config=config, use_critic=config.algorithm.adv_estimator == "gae", use_reference_policy=kl
        )
        RayPPOTrainer._validate_config(trainer)
        omega_conf_to_dataclass(config.critic)


def reward_function(config):
    """Name of the function that verl would call for a reward; None if it would take one of its own."""
    from verl.trainer.ppo.reward import get_custom_reward_fn

    wrapped = get_custom_reward_fn(config)
    if wrapped is None:
        return None
    function, _ = wrapped.args  # of a partial
    return f"{function.__module__}.{function.__name__}"


resolved = {}
with initialize_config_module("verl.trainer.config", version_base=None):
    for name, overrides in given["recipes"].items():
        config = compose("ppo_trainer", overrides)
        for part in (config.actor_rollout_ref, config.critic):
            if not part.model.path.startswith("~"):  # the default, where there is no critic
                part.model.path = given["policy"]  # 0.9 reads its configuration and tokenizer
        validate(config)
        resolved[name] = OmegaConf.to_container(compose("ppo_trainer", overrides), resolve=True)
        resolved[name]["function"] = reward_function(config)
(folder / "result.json").write_text(json.dumps({"version": VERSION, "recipes": resolved}))
