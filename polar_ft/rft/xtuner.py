"""xtuner v1: a reward handler for its judger. In an RL config::

    from xtuner.v1.rl.judger import JudgerConfig
    from polar_ft.rft.xtuner import make_reward_handler

    judger_config = JudgerConfig(
        judger_name="polar", reward_handler=make_reward_handler("my_rm", server_address="127.0.0.1:30000")
    )

xtuner hands over a rollout's response and its ``reward_model["ground_truth"]``, not the prompt: the ground
truth is ``{"prompt": …, "reference": …}``. Not run: written from xtuner's ``v1/rl/judger`` of 2026-08-21.
An error ends a rollout of its single-turn loop; its agent loops drop the sample in training, and count 0
for it in evaluation.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from polar_ft.data.responses import END_TOKENS, without_end
from polar_ft.rft.reward import sample_of_label, shared_reward


def make_reward_handler(
    model: Any, *, end_tokens: Sequence[str] = END_TOKENS, **settings: Any
) -> Callable[..., Awaitable[dict[str, float]]]:
    """Makes the coroutine function that a judger calls for each rollout, many at once.

    Args:
        model: As in `PolarReward`.
        end_tokens: Control tokens that a response ends with; they are taken off.
        **settings: As in `PolarReward`.

    Returns:
        ``reward_handler(response, label, extra_info)``, which gives `Reward.as_row`. It can be sent to the
        processes of ``cpu_resources``.
    """
    settings = {"model": model, **settings}
    shared_reward(settings).check_single_calls("xtuner's judger")  # where mistakes are seen early

    async def reward_handler(response: str, label: Any, extra_info: Any = None) -> dict[str, float]:
        sample = sample_of_label(label, without_end(response, end_tokens))
        return (await shared_reward(settings).score_async(sample)).as_row()

    return reward_handler
