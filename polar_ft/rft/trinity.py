"""Trinity-RFT: a reward function. In the configuration::

    buffer:
      explorer_input:
        default_reward_fn_type: polar_ft.rft.trinity.PolarRewardFn
        taskset:
          reward_fn_args: {model: my_rm, server_address: "127.0.0.1:30000"}

Its workflows hand over the response and the column ``response_key``, not the prompt: that column holds
``{"prompt": …, "reference": …}``. They ask for one response after the other.

An error is raised after ``max_wait`` seconds without a server; Trinity logs it, and trains without the task.
``max_wait`` is 1200 here unless given: Trinity ends a task itself after ``explorer.max_timeout``, 1800 s.
"""

from __future__ import annotations

from typing import Any

from trinity.common.rewards import RewardFn

from polar_ft.rft.reward import sample_of_label, shared_reward


class PolarRewardFn(RewardFn):
    """Scores a response.

    Args:
        **settings: As in `PolarReward`.
    """

    def __init__(self, **settings: Any) -> None:
        # Trinity makes one for every task.
        self._reward = shared_reward({"max_wait": 1200.0, **settings})
        self._reward.check_single_calls("Trinity-RFT")

    def __call__(self, response: str, truth: Any = None, **_: Any) -> dict[str, float]:
        """The reward alone: Trinity adds up all values, so figures for logs cannot be among them."""
        return {"polar": self._reward.submit(sample_of_label(truth, response)).result().score}
