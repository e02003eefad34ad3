"""Losses and penalties of a pair of rewards, one number a pair, unreduced; all in float32.

Names and formulas follow xtuner 0.2.0's ``RewardModel``, so that its configs carry over.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

LossType = Literal["ranking", "focal", "margin"]
PenaltyType = Literal["log_barrier", "L2", "none"]


def pair_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor, loss_type: LossType = "ranking"
) -> torch.Tensor:
    """Loss of each pair.

    - "ranking": Bradley–Terry, -log σ(chosen - rejected).
    - "focal": the same times (1 - 2·relu(σ(chosen - rejected) - ½))², InternLM2 (arXiv 2403.17297, eq. 1).
    - "margin": -log σ(chosen - rejected - margin), Llama 2 (arXiv 2307.09288, eq. 2).

    >>> rewards = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0])
    >>> loss = pair_loss(*rewards, torch.zeros(2))
    >>> [round(value, 4) for value in loss.tolist()]  # log(1 + 1/e), log 2
    [0.3133, 0.6931]

    Args:
        chosen: Rewards of the chosen candidates, [pairs].
        rejected: Rewards of the rejected candidates, [pairs].
        margin: Margins given by the data, [pairs]; used by "margin" alone.
        loss_type: Which loss.

    Returns:
        [pairs].
    """
    difference = chosen - rejected
    if loss_type == "margin":
        return -F.logsigmoid(difference - margin)
    ranking = -F.logsigmoid(difference)
    if loss_type == "ranking":
        return ranking
    certainty = 2 * torch.relu(torch.sigmoid(difference) - 0.5)
    return (1 - certainty) ** 2 * ranking


def pair_penalty(
    chosen: torch.Tensor, rejected: torch.Tensor, penalty_type: PenaltyType = "log_barrier"
) -> torch.Tensor:
    """Penalty on the size of both rewards of each pair; the Bradley–Terry loss alone leaves it free.

    - "log_barrier": -log(5 - r) - log(r + 5), r clamped to ±(5 - 1e-3) (arXiv 2403.17297, eq. 2).
    - "L2": r².
    - "none": 0.

    >>> pair_penalty(torch.tensor([2.0]), torch.tensor([-1.0]), "L2").tolist()
    [5.0]

    Args:
        chosen: [pairs].
        rejected: [pairs].
        penalty_type: Which penalty.

    Returns:
        [pairs].
    """
    if penalty_type == "none":
        return torch.zeros_like(chosen)
    rewards = torch.stack([chosen, rejected])
    if penalty_type == "L2":
        return rewards.square().sum(0)
    bound, epsilon = 5.0, 1e-3
    clamped = rewards.clamp(-bound + epsilon, bound - epsilon)
    return -(torch.log(bound - clamped) + torch.log(clamped + bound)).sum(0)
