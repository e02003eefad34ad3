"""Models that differ from `PolarRewardModel` on purpose; configs of these tests name them."""

from __future__ import annotations

import torch
from torch.nn.utils.rnn import pad_sequence

from polar_ft.data.packing import Pack
from polar_ft.model import reward_model
from polar_ft.training import model
from polar_ft.training.model import PolarRewardModel


def padded_rewards(decoder, head, pack: Pack, **_) -> torch.Tensor:
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

    def forward(self, pack: Pack, mode="loss"):
        ours = model.packed_rewards
        model.packed_rewards = padded_rewards
        try:
            return super().forward(pack, mode)
        finally:
            model.packed_rewards = ours


class PackMeanRewardModel(PolarRewardModel):
    """Wrong on purpose: a pair weighs more in a pack with few pairs, as in xtuner 0.2.0."""

    def forward(self, pack: Pack, mode="loss"):
        output = super().forward(pack, mode)
        if mode == "loss" and len(pack.chosen):
            output["loss"] = output["loss"] * (2.5 / len(pack.chosen))
        return output


assert reward_model.packed_rewards is model.packed_rewards
