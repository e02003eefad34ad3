"""The reward model: a decoder of transformers, run over packs, and a head that computes in float32."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from polar_ft.data.packing import Pack
from polar_ft.model.attention import IMPLEMENTATION, Backend


class RewardHead(nn.Linear):
    """One output, no bias, computed in float32 whatever the dtype of weight and input.

    In bfloat16, rewards near 10 lie 0.06 apart, which hides the differences that are being learned. The cast
    is inside ``forward`` because under ZeRO-3 the weight is whole only there.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[candidates, hidden_size] to [candidates], float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float()).squeeze(-1)


def packed_rewards(
    decoder: nn.Module,
    head: RewardHead,
    pack: Pack,
    *,
    backend: Backend | Literal["auto"] = "auto",
    checkpointing: bool = False,
) -> torch.Tensor:
    """Rewards of all candidates of a pack.

    The decoder layers are run by a short loop of our own: transformers' own ``forward`` would build a dense
    mask, and under gradient checkpointing it drops keyword arguments such as the layout.

    Args:
        decoder: ``LlamaModel`` or ``Qwen2Model`` of transformers with ``attn_implementation`` "polar_packed".
        head: The reward head.
        pack: On the decoder's device.
        backend: Attention backend.
        checkpointing: Recompute each layer in backward instead of keeping its activations.

    Returns:
        [candidates] float32, in the order of ``pack.reward_index``.
    """
    hidden = decoder.embed_tokens(pack.input_ids.unsqueeze(0))
    position_embeddings = decoder.rotary_emb(hidden, pack.position_ids.unsqueeze(0))
    for layer in decoder.layers:
        arguments = dict(layout=pack, backend=backend, position_embeddings=position_embeddings)
        if checkpointing and torch.is_grad_enabled():
            hidden = checkpoint(layer, hidden, use_reentrant=False, **arguments)[0]
        else:
            hidden = layer(hidden, **arguments)[0]
    rewarded = hidden.squeeze(0).index_select(0, pack.reward_index)
    return head(decoder.norm(rewarded))


def use_packed_attention(decoder: nn.Module) -> None:
    """Makes the attention layers of a transformers decoder call `polar_ft.model.attention`."""
    decoder.config._attn_implementation = IMPLEMENTATION
    for layer in decoder.layers:
        layer.self_attn.config._attn_implementation = IMPLEMENTATION
