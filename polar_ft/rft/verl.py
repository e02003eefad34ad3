"""verl: reward functions for its batch and per-sample reward managers.

verl 0.7 and 0.9 take functions of an installed package::

    reward.custom_reward_function.path=pkg://polar_ft.rft.verl
    reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs={model: my_rm, server_address: "gpu-1:30000"}

verl 0.5 takes a file, which needs one line: ``from polar_ft.rft.verl import compute_score_batch``, with
``reward_model.reward_manager=batch``. In 0.7 the batch function needs ``reward_model.use_reward_loop=False``.

Every row returns the same keys: verl keeps those of the first row and fails, or loses values, where others
differ. An error is raised after ``max_wait`` seconds without a server: verl 0.5 then calls the function once
more, and stops; verl 0.9 logs it and leaves out the prompt's group. Its ``rate_limited`` manager would make
0.0 of any error: use ``naive``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from polar_ft.groups import TextGroup
from polar_ft.rft.reward import sample_of, shared_reward


def compute_score_batch(
    data_sources: Sequence[str],
    solution_strs: Sequence[str],
    ground_truths: Sequence[Any],
    extra_infos: Sequence[Mapping[str, Any]],
    **settings: Any,
) -> list[dict[str, float]]:
    """Scores a batch, for ``reward_manager=batch`` of verl 0.5 and 0.7.

    Args:
        data_sources: Not used.
        solution_strs: The policy's outputs.
        ground_truths: The references, as text or messages.
        extra_infos: ``prompt`` is the question as text or messages; ``references``, if given, replaces the
            ground truth by several.
        **settings: As in `PolarReward`.

    Returns:
        `Reward.as_row` for each sample.
    """
    samples = map(_sample, solution_strs, ground_truths, extra_infos)
    return [reward.as_row() for reward in shared_reward(settings).score(list(samples))]


async def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any], **settings: Any
) -> dict[str, float]:
    """Scores one sample, for the per-sample managers (``naive``, ``dapo``) of verl 0.7 and 0.9.

    verl awaits the samples of a chunk together, so they are sent together. Arguments as in
    `compute_score_batch`.
    """
    # Given if verl serves a reward model itself.
    for name in ("reward_router_address", "reward_model_tokenizer"):
        settings.pop(name, None)
    reward = shared_reward(settings)
    return (await reward.score_async(_sample(solution_str, ground_truth, extra_info))).as_row()


def _sample(output: str, ground_truth: Any, extra_info: Mapping[str, Any]) -> TextGroup:
    references = extra_info.get("references") or [ground_truth]
    return sample_of(extra_info.get("prompt"), list(references), output)
