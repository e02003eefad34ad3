"""What is minimised: losses and penalties of pairs of rewards, all in float32.

Names and formulas follow xtuner 0.2.0's ``RewardModel``, so that its configs carry over.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
import torch.nn.functional as F

from polar_ft.errors import PolarError
from polar_ft.model.packing import Pack
from polar_ft.model.settings import LossType, PenaltyType

# What `PairObjective` sums over the pairs of a pack, in this order.
STATISTICS = ("loss", "weight", "correct", "chosen", "rejected")


class PairObjective:
    """The loss of a pack from the rewards of its candidates.

    Args:
        loss_type: See `pair_loss`.
        penalty_type: See `pair_penalty`.
        penalty_weight: Factor of the penalty.

    Raises:
        PolarError: There is no such loss or penalty.
    """

    def __init__(
        self,
        loss_type: LossType = "ranking",
        penalty_type: PenaltyType = "log_barrier",
        penalty_weight: float = 0.01,
    ) -> None:
        _check_name("loss_type", loss_type, LossType)
        _check_name("penalty_type", penalty_type, PenaltyType)
        self.loss_type: LossType = loss_type
        self.penalty_type: PenaltyType = penalty_type
        self.penalty_weight = penalty_weight

    def __call__(self, rewards: torch.Tensor, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over the pairs of a pack; a pack without pairs has the loss 0 and gradients of 0.

        Args:
            rewards: [candidates] float32, in the order of the pack's candidates.
            pack: Says which candidates are paired, their margins and weights.

        Returns:
            The sum of weight × (loss + penalty), a scalar; and `STATISTICS`, float64, without gradient.
        """
        chosen, rejected = rewards[pack.chosen], rewards[pack.rejected]
        losses = pair_loss(chosen, rejected, pack.margin, self.loss_type)
        losses = losses + self.penalty_weight * pair_penalty(chosen, rejected, self.penalty_type)
        loss = (losses * pack.weight).sum()
        with torch.no_grad():
            sums = (loss, pack.weight.sum(), (chosen > rejected).sum(), chosen.sum(), rejected.sum())
            return loss, torch.stack([value.double() for value in sums])


def _check_name(key: str, name: str, known: Any) -> None:
    if name not in get_args(known):
        raise PolarError(f"{key}={name!r} is not one of {', '.join(map(repr, get_args(known)))}")


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
