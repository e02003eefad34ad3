"""verl: reward functions for its batch and per-sample reward managers.

verl 0.7 and 0.9 take functions of an installed package::

    reward.custom_reward_function.path=pkg://polar_ft.rft.verl
    reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs={model: my_rm, server_address: "gpu-1:30000"}

verl 0.5 takes a file, which needs one line: ``from polar_ft.rft.verl import compute_score_batch``, with
``reward_model.reward_manager=batch``. In 0.7 the batch function needs ``reward_model.use_reward_loop=False``.
For 0.9 there is a reward manager as well, `polar_ft.rft.verl_manager`.

Every row returns the same keys: verl keeps those of the first row and fails, or loses values, where others
differ. An error is raised after ``max_wait`` seconds without a server: verl 0.5 then calls the function once
more, which fails at once, and stops; verl 0.9 logs it and leaves out the prompt's group. Its ``rate_limited``
manager would make 0.0 of any error: use ``naive``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from polar_ft.client.errors import RewardServerError
from polar_ft.rft.reward import PolarReward, Sample, sample_of, shared_reward

# Seconds after a failure in which a batch fails with the same error: verl 0.5 prints any error of a batch and
# calls again at once, which would double the wait.
REPEATED_CALL_SECONDS = 60.0
_failures: dict[PolarReward, tuple[float, RewardServerError]] = {}


def compute_score_batch(
    data_sources: Sequence[str],
    solution_strs: Sequence[str],
    ground_truths: Sequence[Any],
    extra_infos: Sequence[Mapping[str, Any]],
    **settings: Any,
) -> list[dict[str, float]]:
    """Scores a batch, for ``reward_manager=batch`` of verl 0.5 and 0.7.

    With ``normalise``, rows not for training keep their rewards: verl validates with the same function.

    Args:
        data_sources: Not used.
        solution_strs: The policy's outputs.
        ground_truths: The references, as text or messages.
        extra_infos: ``prompt`` is the question as text or messages; ``references``, if given, replaces the
            ground truth by several; ``rule`` as in `sample_of`.
        **settings: As in `PolarReward`.

    Returns:
        `Reward.as_row` for each sample.

    Raises:
        RewardServerError: No server answered; also if that was so less than a minute ago.
    """
    if settings.get("normalise", "none") != "none" and not all(map(for_training, extra_infos)):
        settings = {**settings, "normalise": "none", "watch": None}
    reward = shared_reward(settings)
    if reward in _failures:
        failed_at, error = _failures.pop(reward)
        if time.monotonic() - failed_at < REPEATED_CALL_SECONDS:
            raise error
    samples = map(sample_of_row, solution_strs, ground_truths, extra_infos)
    try:
        return [scored.as_row() for scored in reward.score(list(samples))]
    except RewardServerError as error:
        _failures[reward] = (time.monotonic(), error)
        raise


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
    reward.check_single_calls("verl's per-sample reward function")
    return (await reward.score_async(sample_of_row(solution_str, ground_truth, extra_info))).as_row()


def sample_of_row(output: str, ground_truth: Any, extra_info: Mapping[str, Any]) -> Sample:
    """The sample of a row of verl's data.

    Args:
        output: What the policy wrote.
        ground_truth: The reference, unless ``extra_info`` has ``references``.
        extra_info: ``prompt``, ``references`` and ``rule``.

    >>> sample = sample_of_row("four", "4", {"prompt": "2 + 2?", "references": ["4", "IV"]})
    >>> sample.prompt, sample.references
    ('2 + 2?', ('4', 'IV'))
    """
    references = extra_info.get("references") or [ground_truth]
    return sample_of(extra_info.get("prompt"), list(references), output, extra_info.get("rule"))


def for_training(extra_info: Mapping[str, Any]) -> bool:
    """Whether a row is one to train on: ``split``, which ``polar-ft data to-verl`` writes, is the only sign.

    >>> for_training({"split": "train"}), for_training({"split": "test"}), for_training({})
    (True, False, True)
    """
    return str(extra_info.get("split", "train")).startswith("train")
