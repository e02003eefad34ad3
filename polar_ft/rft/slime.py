"""slime: a custom reward function, per sample or per group.

In a file of yours::

    from polar_ft.rft.slime import make_custom_rm

    custom_rm = make_custom_rm("my_rm", server_address="127.0.0.1:30000")

``--custom-rm-path my_file.custom_rm``, with or without ``--group-rm``. The label column holds ``{"prompt": …,
"reference": …}``. Not run: written from slime's ``rollout/rm_hub`` of 2026-08-21. An error ends the rollout.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from polar_ft.data.responses import END_TOKENS, without_end
from polar_ft.rft.reward import PolarReward, Sample, sample_of_label


def make_custom_rm(
    model: Any, *, end_tokens: Sequence[str] = END_TOKENS, **settings: Any
) -> Callable[[Any, Any], Awaitable[Any]]:
    """Makes the coroutine function that slime calls with a sample, or with the samples of a group.

    Args:
        model: As in `PolarReward`.
        end_tokens: Control tokens that a response ends with; they are taken off.
        **settings: As in `PolarReward`; ``normalise`` needs ``--group-rm``.
    """
    reward = PolarReward(model, **settings)

    def sample_of(sample: Any) -> Sample:
        return sample_of_label(sample.label, without_end(sample.response, end_tokens))

    async def custom_rm(args: Any, samples: Any) -> float | list[float]:
        if not isinstance(samples, list):
            reward.check_single_calls("slime without --group-rm")
            return (await reward.score_async(sample_of(samples))).score
        group = list(map(sample_of, samples))
        if reward.normalise != "none":
            return [scored.score for scored in await asyncio.to_thread(reward.score, group)]
        # So that groups that are under way at once are sent together.
        return [scored.score for scored in await asyncio.gather(*map(reward.score_async, group))]

    return custom_rm
