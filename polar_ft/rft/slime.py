"""slime: a custom reward function, per sample or per group.

In a file of yours::

    from polar_ft.rft.slime import make_custom_rm

    custom_rm = make_custom_rm("my_rm", server_address="127.0.0.1:30000")

``--custom-rm-path my_file.custom_rm``, with or without ``--group-rm``. The label column holds ``{"prompt": …,
"reference": …}``. Not run: written from slime's ``rollout/rm_hub`` of 2026-08-21. An error ends the rollout.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from polar_ft.rft.reward import PolarReward, sample_of_label


def make_custom_rm(model: Any, **settings: Any) -> Callable[[Any, Any], Awaitable[Any]]:
    """Makes the coroutine function that slime calls with a sample, or with the samples of a group.

    Args:
        model: As in `PolarReward`.
        **settings: As in `PolarReward`; ``normalise`` needs ``--group-rm``.
    """
    reward = PolarReward(model, **settings)

    async def custom_rm(args: Any, samples: Any) -> float | list[float]:
        if not isinstance(samples, list):
            reward.check_single_calls("slime without --group-rm")
            return (await reward.score_async(sample_of_label(samples.label, samples.response))).score
        group = [sample_of_label(sample.label, sample.response) for sample in samples]
        if reward.normalise != "none":
            return [scored.score for scored in await asyncio.to_thread(reward.score, group)]
        # So that groups that are under way at once are sent together.
        return [scored.score for scored in await asyncio.gather(*map(reward.score_async, group))]

    return custom_rm
