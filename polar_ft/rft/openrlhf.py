"""OpenRLHF: the reward function of a file that ``--reward.remote_url`` names (once ``--remote_rm_url``)::

    from polar_ft.rft.openrlhf import make_reward_func

    reward_func = make_reward_func("my_rm", server_address="127.0.0.1:30000")

This form is the one to use: over HTTP OpenRLHF sends one sample a request, and gives up after five refused
connections, one second apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from polar_ft.data.responses import END_TOKENS, response_of
from polar_ft.rft.reward import PolarReward, sample_of_label


def make_reward_func(
    model: Any,
    *,
    end_tokens: Sequence[str] = END_TOKENS,
    **settings: Any,
) -> Callable[[Sequence[str], Sequence[str], Sequence[Any]], dict[str, Any]]:
    """Makes the function that OpenRLHF calls for each sample, many at once from threads.

    OpenRLHF hands over the whole text with its chat template, so question and reference travel in the label
    column: ``{"prompt": …, "reference": …}`` or ``{"prompt": …, "references": […]}``.

    Args:
        model: As in `PolarReward`.
        end_tokens: Control tokens that the decoded output ends with; they are taken off.
        **settings: As in `PolarReward`.

    Returns:
        ``reward_func(queries, prompts, labels)``.
    """
    reward = PolarReward(model, **settings)
    reward.check_single_calls("OpenRLHF")

    def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any]) -> dict[str, Any]:
        futures = [
            reward.submit(sample_of_label(label, response_of(query, prompt, end_tokens)))
            for query, prompt, label in zip(queries, prompts, labels, strict=True)
        ]
        rows = [future.result().as_row() for future in futures]
        scores = [row.pop("score") for row in rows]
        # One number a name: OpenRLHF makes a tensor of it.
        logs = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        return {"rewards": scores, "scores": scores, "extra_logs": logs}

    return reward_func
