"""The reward model: a decoder of transformers, run over packs, and a head that computes in float32.

Names of tensors end in their shape: B 1 (a pack is one row), T tokens of the pack, Q queries (all tokens, or
the reward tokens), H heads, D head_dim, M hidden_size, X any.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import rotate_half

from polar_ft.errors import PolarError
from polar_ft.model.attention import Backend, packed_attention
from polar_ft.model.packing import Pack

# What `run_layer` knows of a decoder layer; q_norm and k_norm are Qwen3's.
_KNOWN = {
    "": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}


class RewardHead(nn.Linear):
    """One output, no bias, computed in float32 whatever the dtype of weight and input.

    In bfloat16, rewards near 10 lie 0.06 apart, which hides the differences that are being learned. The cast
    is inside ``forward`` because under ZeRO-3 the weight is complete only there.
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
        decoder: A decoder of transformers, of a family in `polar_ft.model.backbones`.
        head: The reward head.
        pack: On the decoder's device.
        backend: Attention backend.
        checkpointed_layers: So many layers, from the first, are computed again in backward instead of
            keeping their activations.

    Returns:
        [candidates] float32, in the order of ``pack.reward_index``.
    """
    hidden_BTM = decoder.embed_tokens(pack.input_ids.unsqueeze(0))
    rotary = decoder.rotary_emb(hidden_BTM, pack.position_ids.unsqueeze(0))
    last = len(decoder.layers) - 1
    for number, layer in enumerate(decoder.layers):
        arguments = (layer, hidden_BTM, rotary, pack, number == last, backend)
        if number < checkpointed_layers and torch.is_grad_enabled():
            hidden_BTM = checkpoint(run_layer, *arguments, use_reentrant=False)
        else:
            hidden_BTM = run_layer(*arguments)
    return head(decoder.norm(hidden_BTM.squeeze(0)))


def run_layer(
    layer: Any,
    hidden_BTM: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    pack: Pack,
    rewards_only: bool,
    backend: Backend | Literal["auto"] = "auto",
) -> torch.Tensor:
    """One decoder layer of the Llama kind over a pack.

    The steps of transformers' ``LlamaDecoderLayer`` and ``LlamaAttention``, and where a layer has ``q_norm``
    and ``k_norm`` those of ``Qwen3Attention``.

    Args:
        layer: The layer.
        hidden_BTM: [1, tokens, hidden_size].
        rotary: Cosine and sine, [1, tokens, head_dim].
        pack: Says who attends to whom.
        rewards_only: Keys and values of all tokens, everything else of the reward tokens alone.
        backend: Attention backend.

    Returns:
        [1, tokens, hidden_size], or with ``rewards_only`` [1, candidates, hidden_size].
    """
    attention = layer.self_attn
    segments = pack.reward_segments if rewards_only else pack.segments

    def queried(states_BTX: torch.Tensor) -> torch.Tensor:
        return states_BTX.index_select(1, pack.reward_index) if rewards_only else states_BTX

    def heads(states_BTX: torch.Tensor, norm: str = "") -> torch.Tensor:
        states_BTHD = states_BTX.unflatten(-1, (-1, attention.head_dim))
        if hasattr(attention, norm):
            states_BTHD = getattr(attention, norm)(states_BTHD)
        return states_BTHD.transpose(1, 2)

    normed_BTM = layer.input_layernorm(hidden_BTM)
    query_BHQD = heads(attention.q_proj(queried(normed_BTM)), "q_norm")
    key_BHTD = heads(attention.k_proj(normed_BTM), "k_norm")
    value_BHTD = heads(attention.v_proj(normed_BTM))
    fused = getattr(attention, "fused_rotary", None)
    if fused is not None and not rewards_only and query_BHQD.is_cuda:
        query_BHQD, key_BHTD = fused(query_BHQD, key_BHTD, *rotary)
    else:
        query_BHQD = _rotate(query_BHQD, *map(queried, rotary))
        key_BHTD = _rotate(key_BHTD, *rotary)
    attended_BQHD = packed_attention(
        query_BHQD, key_BHTD, value_BHTD, segments=segments, backend=backend, scaling=attention.scaling
    )
    hidden_BQM = queried(hidden_BTM) + attention.o_proj(attended_BQHD.flatten(2))
    return hidden_BQM + layer.mlp(layer.post_attention_layernorm(hidden_BQM))


def _rotate(states_BHTD: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (Su et al., arXiv 2104.09864) as transformers computes it."""
    return states_BHTD * cos_BTD.unsqueeze(1) + rotate_half(states_BHTD) * sin_BTD.unsqueeze(1)


def refuse_unknown_layers(decoder: Any, name: str) -> None:
    """Raises PolarError where a layer has a part that `run_layer` would leave out.

    Args:
        decoder: As transformers builds it.
        name: Name used in the error message.
    """
    for number, layer in enumerate(decoder.layers):
        for place, known in _KNOWN.items():
            module = layer.get_submodule(place)
            parts = {*dict(module.named_children()), *dict(module.named_parameters(recurse=False))}
            for part in sorted(parts - known):
                where = ".".join(filter(None, (f"layers.{number}", place, part)))
                raise PolarError(
                    f"{name}: {where} ({type(getattr(module, part)).__name__}) is not known to polar_ft, "
                    f"which would leave it out; this version of transformers, or this model, is not supported"
                )
