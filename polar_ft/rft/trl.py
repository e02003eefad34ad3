"""TRL: a reward function for `GRPOTrainer`, `RLOOTrainer` and the online trainers.

    GRPOTrainer(model, reward_funcs=PolarRewardFunction("my_rm", server_address="127.0.0.1:30000"), …)

The data set needs the columns ``prompt`` and ``reference`` (a text or messages), or ``references``; a column
``rule`` names the rule of a row, if it asks for one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from statistics import fmean
from typing import Any

from polar_ft.errors import PolarError
from polar_ft.rft.reward import PolarReward, sample_of


class PolarRewardFunction:
    """Callable that TRL calls with a batch of prompts and completions.

    Where no server answers within ``max_wait`` seconds it raises, which stops the run: TRL reads None and NaN
    as "not applicable" and would go on with an advantage of 0.

    Args:
        model: As in `PolarReward`.
        prompt: Column with the question that the reward model reads; None takes TRL's own prompts. Another
            column is needed if the policy's prompt has instructions that the reward model shall not see.
        **settings: As in `PolarReward`.
    """

    __name__ = "polar"  # in TRL's logs

    def __init__(self, model: Any, *, prompt: str | None = None, **settings: Any) -> None:
        self.reward = PolarReward(model, **settings)
        self._prompt = prompt

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Scores completions; rewards come in their order."""
        questions = prompts if self._prompt is None else self._column(columns, self._prompt)
        references = columns.get("references")
        if references is None:
            references = [[reference] for reference in self._column(columns, "reference")]
        rules = columns.get("rule") or [None] * len(completions)
        samples = list(map(sample_of, questions, references, completions, rules))
        rewards = self.reward.score(samples)
        if log_metric is not None and rewards:
            log_metric("polar/raw", fmean(reward.raw for reward in rewards))
            log_metric("polar/unanswered", fmean(not reward.answered for reward in rewards))
            log_metric("polar/truncated", fmean(reward.truncated for reward in rewards))
        return [reward.score for reward in rewards]

    @staticmethod
    def _column(columns: dict[str, Any], name: str) -> Sequence[Any]:
        if name not in columns:
            raise PolarError(f"the data set has no column {name!r}, which the reward needs; add it")
        return columns[name]


def async_reward_function(model: Any, **settings: Any) -> Callable[..., Awaitable[list[float]]]:
    """`PolarRewardFunction` as a coroutine function: TRL runs several of them at once.

    Args:
        model: As in `PolarReward`.
        **settings: As in `PolarRewardFunction`.
    """
    function = PolarRewardFunction(model, **settings)

    async def polar(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        return await asyncio.to_thread(function, prompts, completions, **columns)

    return polar
