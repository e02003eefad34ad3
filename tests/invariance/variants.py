"""Models that differ from `PolarRewardModel` on purpose; configs of these tests name them."""

from __future__ import annotations

import torch
from torch.nn.utils.rnn import pad_sequence

from polar_ft.data.step_plan import StepPlan
from polar_ft.model.packing import Pack
from polar_ft.training.data import RewardDataset, build_reward_dataset
from polar_ft.training.model import PolarRewardModel


def padded_rewards(decoder, head, pack: Pack) -> torch.Tensor:
    """Rewards of a flat pack, each pair of sequences padded to one length, by transformers' own forward."""
    assert pack.segments.key_index is None
    decoder.config._attn_implementation = "sdpa"
    rewards = []
    sequences = pack.input_ids.split(pack.segments.q_lengths)
    for pair in (sequences[i : i + 2] for i in range(0, len(sequences), 2)):
        ids = pad_sequence(pair, batch_first=True)
        mask = pad_sequence([torch.ones_like(sequence) for sequence in pair], batch_first=True)
        hidden = decoder(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        ends = mask.sum(1) - 1
        rewards.append(head(hidden[torch.arange(len(pair)), ends]))
    return torch.cat(rewards)


class PaddedRewardModel(PolarRewardModel):
    """The canonical run."""

    def forward(self, pack: Pack):
        return padded_rewards(self.llm, self.v_head, pack)


class PackMeanRewardModel(PolarRewardModel):
    """Wrong on purpose: a pair weighs more in a pack with few pairs, as in xtuner 0.2.0."""

    def __init__(self, *arguments, **settings) -> None:
        super().__init__(*arguments, **settings)
        objective = self.objective

        def wrong(rewards: torch.Tensor, pack: Pack):
            loss, statistics = objective(rewards, pack)
            return (loss * (2.5 / len(pack.chosen)) if len(pack.chosen) else loss), statistics

        self.objective = wrong


class ReversedPlan:
    """A step plan with the packs of each step, and the groups of each pack, in the opposite order."""

    def __init__(self, plan: StepPlan) -> None:
        self.plan = plan

    def __getattr__(self, name: str):
        return getattr(self.plan, name)

    def packs(self, epoch: int, step: int):
        return [[pieces[::-1] for pieces in packs[::-1]] for packs in self.plan.packs(epoch, step)]


def build_reversed_dataset(*arguments, **settings) -> RewardDataset:
    """`build_reward_dataset`, with another order of groups and packs within each step."""
    dataset = build_reward_dataset(*arguments, **settings)
    dataset.plan = ReversedPlan(dataset.plan)
    return dataset
