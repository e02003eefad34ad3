"""verl 0.9: a reward manager, which sees more of a row than a reward function::

    reward.reward_manager.source=importlib
    reward.reward_manager.module.path=pkg://polar_ft.rft.verl_manager
    reward.reward_manager.name=PolarRewardManager
    +reward.custom_reward_function.reward_kwargs={model: my_rm, server_address: "gpu-1:30000"}

It takes the policy's own prompt where a row has no ``extra_info["prompt"]``, and can normalise within the
rollouts of a prompt, with ``reward.num_workers=1``: verl gives each rollout to a random one of its reward
workers, so with several none sees a complete group.

An error is raised after ``max_wait`` seconds without a server; verl logs it and leaves out the group.
"""

from __future__ import annotations

import asyncio
from typing import Any

from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from polar_ft.errors import PolarError
from polar_ft.rft.reward import Reward, Sample, shared_reward
from polar_ft.rft.verl import for_training, sample_of_row


class PolarRewardManager(RewardManagerBase):
    """Scores rollouts as they finish; one for each of verl's reward workers.

    ``reward_kwargs`` are settings as in `PolarReward`. With ``normalise="group"`` a rollout waits for the
    others of its prompt, ``rollout.n`` in all, for at most ``max_wait`` seconds. Rows not for training keep
    their rewards: verl validates with the same manager and another number of rollouts.

    Raises:
        PolarError: A setting is wrong; or ``normalise`` is "batch", which no reward worker of verl sees, or
            "group" with several reward workers.
    """

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        compute_score: Any,
        reward_router_address: str | None = None,
        reward_model_tokenizer: Any = None,
    ) -> None:
        super().__init__(config, tokenizer, compute_score)
        settings = dict(config.reward.custom_reward_function.get("reward_kwargs") or {})
        self._grouped = self._single = shared_reward(settings)
        self._groups: dict[str, _Group] = {}
        self._wait = float(settings.get("max_wait", 1800.0))
        if self._grouped.normalise == "batch":
            raise PolarError(
                'normalise="batch": a reward worker of verl sees single rollouts, never a batch; "group" '
                "works, with reward.num_workers=1"
            )
        if self._grouped.normalise == "group":
            self._size = config.actor_rollout_ref.rollout.n
            if config.reward.num_workers != 1:
                raise PolarError(
                    f'normalise="group" needs reward.num_workers=1, and it is {config.reward.num_workers}: '
                    f"verl gives each rollout to a random reward worker, so none would see a complete group"
                )
            self._single = shared_reward({**settings, "normalise": "none", "watch": None})

    async def run_single(self, data: Any) -> dict[str, Any]:
        """Scores one rollout, the last sequence of ``data``.

        Returns:
            ``reward_score``, and `Reward.as_row` as ``reward_extra_info``.
        """
        item = data[-1:][0]
        row = item.non_tensor_batch
        info = row.get("extra_info") or {}
        ids = item.batch["responses"]
        ids = ids[: item.batch["attention_mask"][-len(ids) :].sum()]
        output = await asyncio.to_thread(self.tokenizer.decode, ids, skip_special_tokens=True)
        prompt = info.get("prompt")
        if prompt is None and "raw_prompt" in row:
            prompt = list(row["raw_prompt"])
        sample = sample_of_row(output, row["reward_model"]["ground_truth"], {**info, "prompt": prompt})
        if self._grouped.normalise == "group" and for_training(info):
            reward = await self._score_in_group(row["uid"], sample)
        else:
            reward = await self._single.score_async(sample)
        return {"reward_score": reward.score, "reward_extra_info": reward.as_row()}

    async def _score_in_group(self, uid: str, sample: Sample) -> Reward:
        if uid not in self._groups:
            self._groups[uid] = _Group()
            self._groups[uid].rewards = asyncio.create_task(self._score_group(uid, self._groups[uid]))
        group = self._groups[uid]
        group.samples.append(sample)
        place = len(group.samples) - 1
        if len(group.samples) == self._size:
            group.complete.set()
        # Shielded: a rollout that is cancelled takes no reward from the others.
        return (await asyncio.shield(group.rewards))[place]

    async def _score_group(self, uid: str, group: _Group) -> list[Reward]:
        try:
            await asyncio.wait_for(group.complete.wait(), self._wait)
        except asyncio.TimeoutError:
            raise PolarError(
                f'normalise="group": {len(group.samples)} of the {self._size} rollouts of a prompt came '
                f"within {self._wait:g} s; has one failed?"
            ) from None
        finally:
            del self._groups[uid]
        return await asyncio.to_thread(self._grouped.score, group.samples)


class _Group:
    """Rollouts of a prompt that wait for the others."""

    rewards: asyncio.Task[list[Reward]]

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.complete = asyncio.Event()
