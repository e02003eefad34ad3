"""The reward model: a decoder of transformers, run over packs, and a head that computes in float32."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import rotate_half

from polar_ft.model.attention import IMPLEMENTATION, Backend, packed_attention
from polar_ft.model.packing import Pack


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
    decoder: Any,
    head: RewardHead,
    pack: Pack,
    *,
    backend: Backend | Literal["auto"] = "auto",
    checkpointed_layers: int = 0,
) -> torch.Tensor:
    """Rewards of all candidates of a pack.

    The decoder layers are run by a short loop of our own: transformers' own ``forward`` would build a dense
    mask, and under gradient checkpointing it drops keyword arguments such as the segments. The last layer
    computes for the reward tokens alone, since nothing else of it is used.

    Args:
        decoder: ``LlamaModel`` or ``Qwen2Model`` of transformers, after `use_packed_attention`.
        head: The reward head.
        pack: On the decoder's device.
        backend: Attention backend.
        checkpointed_layers: So many layers, from the first, are computed again in backward instead of
            keeping their activations.

    Returns:
        [candidates] float32, in the order of ``pack.reward_index``.
    """
    hidden = decoder.embed_tokens(pack.input_ids.unsqueeze(0))
    position_embeddings = decoder.rotary_emb(hidden, pack.position_ids.unsqueeze(0))
    last = len(decoder.layers) - 1
    for number, layer in enumerate(decoder.layers):
        run = _reward_layer if number == last else _whole_layer
        arguments = (layer, hidden, position_embeddings, pack, backend)
        if number < checkpointed_layers and torch.is_grad_enabled():
            hidden = checkpoint(run, *arguments, use_reentrant=False)
        else:
            hidden = run(*arguments)
    return head(decoder.norm(hidden.squeeze(0)))


def _whole_layer(layer, hidden, position_embeddings, pack: Pack, backend) -> torch.Tensor:
    return layer(hidden, segments=pack.segments, backend=backend, position_embeddings=position_embeddings)[0]


def _reward_layer(layer, hidden, position_embeddings, pack: Pack, backend) -> torch.Tensor:
    """The last layer: keys and values of all tokens, everything else of the reward tokens.

    The steps of transformers' ``LlamaDecoderLayer.forward`` and ``LlamaAttention.forward``. Returns
    [1, candidates, hidden].
    """
    attention, at = layer.self_attn, pack.reward_index
    cos, sin = position_embeddings
    normed = layer.input_layernorm(hidden)

    def heads(states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    query = heads(attention.q_proj(normed.index_select(1, at)))
    query = _rotate(query, cos.index_select(1, at), sin.index_select(1, at))
    key, value = _rotate(heads(attention.k_proj(normed)), cos, sin), heads(attention.v_proj(normed))
    output, _ = packed_attention(
        attention,
        query,
        key,
        value,
        None,
        segments=pack.reward_segments,
        backend=backend,
        scaling=attention.scaling,
    )
    hidden = hidden.index_select(1, at) + attention.o_proj(output.flatten(2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [1, heads, tokens, head_dim] with [1, tokens, head_dim]."""
    return states * cos.unsqueeze(1) + rotate_half(states) * sin.unsqueeze(1)


def use_packed_attention(decoder: Any) -> None:
    """Makes the attention layers of a transformers decoder call `polar_ft.model.attention`."""
    decoder.config._attn_implementation = IMPLEMENTATION
    for layer in decoder.layers:
        layer.self_attn.config._attn_implementation = IMPLEMENTATION
