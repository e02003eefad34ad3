"""InternLM2 is Llama with other names and one matrix for queries, keys and values: both ways, exactly.

Tensors of a layer, InternLM2 on the left::

    attention.wqkv   [(heads + 2 kv_heads) · head_dim, hidden]    self_attn.q_proj, k_proj, v_proj
    attention.wo     [hidden, heads · head_dim]                   self_attn.o_proj
    feed_forward.w1, w3, w2                                       mlp.gate_proj, up_proj, down_proj
    attention_norm, ffn_norm                                      input_layernorm, post_attention_layernorm

Rows of ``wqkv`` are interleaved by group of query heads: for each key-value head its queries, then its key,
then its value (``rearrange(…, "(h gs d)")`` in ``modeling_internlm2.py``)::

    4 heads, 2 kv_heads:   q0 q1 k0 v0 | q2 q3 k1 v1      each head_dim rows
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import LlamaConfig

from polar_ft.errors import PolarError

# Pieces of names that differ, InternLM2 to Llama; wqkv is the one that is not a renaming.
_RENAMED = {
    "tok_embeddings": "embed_tokens",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_WQKV = "attention.wqkv"
_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def to_llama_names(name: str) -> tuple[str, ...]:
    """Llama's name of an InternLM2 tensor, or the three names whose fusion it is.

    >>> to_llama_names("layers.0.feed_forward.w2.weight")
    ('layers.0.mlp.down_proj.weight',)
    >>> len(to_llama_names("layers.0.attention.wqkv.weight"))
    3
    """
    if _WQKV in name:
        return tuple(name.replace(_WQKV, projection) for projection in _PROJECTIONS)
    for internlm2, llama in _RENAMED.items():
        if internlm2 in name:
            return (name.replace(internlm2, llama),)
    return (name,)


def to_internlm2_name(name: str) -> str:
    """InternLM2's name of a Llama tensor; queries, keys and values share one.

    >>> to_internlm2_name("layers.0.self_attn.k_proj.weight")
    'layers.0.attention.wqkv.weight'
    """
    for projection in _PROJECTIONS:
        if projection in name:
            return name.replace(projection, _WQKV)
    for internlm2, llama in _RENAMED.items():
        if llama in name:
            return name.replace(llama, internlm2)
    return name


def split_wqkv(
    fused: torch.Tensor, heads: int, kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of a fused weight or bias, each contiguous and with memory of its own.

    Args:
        fused: [(heads + 2 · kv_heads) · head_dim, …].
        heads: Number of query heads.
        kv_heads: Number of key-value heads.

    Returns:
        [heads · head_dim, …], [kv_heads · head_dim, …], [kv_heads · head_dim, …].

    Four heads in two groups, head_dim 1:

    >>> [part.tolist() for part in split_wqkv(torch.arange(8), heads=4, kv_heads=2)]
    [[0, 1, 4, 5], [2, 6], [3, 7]]
    """
    groups = heads // kv_heads
    rest = fused.shape[1:]
    # [kv_heads, groups + 2, head_dim, …]
    grouped = fused.reshape(kv_heads, groups + 2, -1, *rest)

    def own(part: torch.Tensor) -> torch.Tensor:
        return part.clone(memory_format=torch.contiguous_format).reshape(-1, *rest)

    return own(grouped[:, :groups]), own(grouped[:, groups]), own(grouped[:, groups + 1])


def fuse_wqkv(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, kv_heads: int
) -> torch.Tensor:
    """The inverse of `split_wqkv`.

    >>> fuse_wqkv(torch.tensor([0, 1, 4, 5]), torch.tensor([2, 6]), torch.tensor([3, 7]), 4, 2).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    rest = query.shape[1:]
    grouped = [
        query.reshape(kv_heads, heads // kv_heads, -1, *rest),
        key.reshape(kv_heads, 1, -1, *rest),
        value.reshape(kv_heads, 1, -1, *rest),
    ]
    return torch.cat(grouped, dim=1).reshape(-1, *rest)


def internlm2_config_to_llama(config: Mapping[str, Any]) -> LlamaConfig:
    """The `LlamaConfig` of the same mathematics as a ``config.json`` of model type ``internlm2``.

    What the file leaves out has the default of InternLM2's own config class, not of Llama's.

    Raises:
        PolarError: A size is missing, sizes do not fit each other, or InternLM2 has no such RoPE scaling.
    """
    missing = [key for key in _REQUIRED if key not in config]
    if missing:
        raise PolarError(
            f"config.json of an internlm2 model has no {', '.join(missing)}; the file is incomplete"
        )
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    if config["hidden_size"] % heads or heads % kv_heads:
        raise PolarError(
            f"config.json: hidden_size={config['hidden_size']}, num_attention_heads={heads} and "
            f"num_key_value_heads={kv_heads} do not divide each other"
        )
    bias = config.get("bias", True)
    return LlamaConfig(
        **{key: config[key] for key in _REQUIRED},
        num_key_value_heads=kv_heads,
        head_dim=config["hidden_size"] // heads,
        hidden_act=config.get("hidden_act", "silu"),
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        initializer_range=config.get("initializer_range", 0.02),
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=config.get("rope_theta", 10000),
        rope_scaling=_rope_scaling(config.get("rope_scaling")),
        # In InternLM2 the one switch is for wqkv and wo; its feed-forward layers never have a bias.
        attention_bias=bias,
        mlp_bias=False,
        pad_token_id=config.get("pad_token_id", 0),
        bos_token_id=config.get("bos_token_id", 1),
        eos_token_id=config.get("eos_token_id", 2),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
    )


def _rope_scaling(scaling: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    kind = scaling.get("rope_type", scaling.get("type"))
    factor = scaling.get("factor")
    if kind not in ("dynamic", "linear") or not isinstance(factor, (int, float)) or factor < 1:
        raise PolarError(
            f"config.json: rope_scaling={dict(scaling)} is not known; an internlm2 model has "
            f'null, {{"type": "dynamic", "factor": F}} or {{"type": "linear", "factor": F}} with F at least 1'
        )
    return {"rope_type": kind, "factor": float(factor)}
