"""NeMo-RL: an environment that scores the last turn. In the launch script, before its ``main``::

    from polar_ft.rft.nemo_rl import register

    register()

In the configuration ``data.env_name: polar``, and settings such as ``model: my_rm`` under ``env.polar``.
A row's ``extra_env_info`` is ``{"prompt": …, "reference": …}``, or has that as ``ground_truth``.

An error is raised after ``max_wait`` seconds without a server and ends the run. Not run: written from the
``environments`` and ``experience/rollouts.py`` of NeMo-RL of 2026-08-22.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY
from nemo_rl.distributed.virtual_cluster import PY_EXECUTABLES

# The base install of polar_ft has no torch.
from nemo_rl.environments.interfaces import EnvironmentInterface, EnvironmentReturn, Tensor
from nemo_rl.environments.utils import register_env

from polar_ft.rft.reward import sample_of_label, shared_reward


class PolarScoring(EnvironmentInterface):
    """What the environment does, outside of Ray; see `PolarEnvironment`.

    Args:
        config: Settings as in `PolarReward`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._reward = shared_reward(config)

    # Async, since rollouts of the asynchronous engine come one by one, many at once.
    async def step(
        self,
        message_log_batch: Sequence[Sequence[Mapping[str, Any]]],
        metadata: Sequence[Mapping[str, Any]],
        return_extracted_answer: bool = False,
    ) -> EnvironmentReturn:
        """Scores the last message of each conversation, which ends there.

        Raises:
            PolarError: A conversation cannot be scored; or ``normalise`` is set and NeMo-RL's engine is
                asynchronous, which hands over one conversation at a time.
        """
        outputs = [log[-1]["content"] for log in message_log_batch]
        samples = [
            sample_of_label(row.get("ground_truth", row), output)
            for row, output in zip(metadata, outputs, strict=True)
        ]
        if len(samples) == 1:
            self._reward.check_single_calls("NeMo-RL's asynchronous engine")
            rewards = [await self._reward.score_async(samples[0])]
        else:
            rewards = await asyncio.to_thread(self._reward.score, samples)
        scores = [reward.score for reward in rewards]
        return EnvironmentReturn(
            observations=[
                {"role": "environment", "content": f"Environment: {score:.3f}"} for score in scores
            ],
            metadata=list(metadata),
            next_stop_strings=[None] * len(scores),
            rewards=Tensor(scores),
            terminateds=Tensor([1] * len(scores)).bool(),
            answers=outputs if return_extracted_answer else None,
        )

    def global_post_process_and_metrics(self, batch: Any) -> tuple[Any, dict[str, float]]:
        """The batch as it is, and no figures: ``watch`` has them."""
        return batch, {}


PolarEnvironment = ray.remote(PolarScoring)


def register(name: str = "polar") -> None:
    """Makes the environment known to NeMo-RL under a name, and that it runs in the driver's Python."""
    place = f"{__name__}.PolarEnvironment"
    register_env(name, place)
    ACTOR_ENVIRONMENT_REGISTRY[place] = PY_EXECUTABLES.SYSTEM
