"""Attention over a pack, by one of three backends that give the same result.

``flash_attn`` where it is installed, ``torch`` (``torch.nn.attention.varlen``) on CUDA in half precision,
and ``sdpa``, one ``scaled_dot_product_attention`` call for each segment, anywhere else. None of them builds
a tokens × tokens mask.

The layout of the pack arrives as a keyword argument of the attention function. That is the one way which
survives activation checkpointing: a global or a ContextVar is gone when backward recomputes in another
thread.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from polar_ft.data.packing import Pack
from polar_ft.errors import PolarError

Backend = Literal["flash_attn", "torch", "sdpa"]

# The name under which transformers finds `packed_attention`.
IMPLEMENTATION = "polar_packed"


@functools.cache
def has_flash_attn() -> bool:
    """Whether flash-attention 2 can be imported, of a version that aligns causal masks bottom right."""
    if importlib.util.find_spec("flash_attn") is None:
        return False
    try:
        import flash_attn
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except ImportError:
        return False
    version = tuple(int(part) for part in flash_attn.__version__.split(".")[:2])
    return version >= (2, 1)


@functools.cache
def has_torch_varlen() -> bool:
    """Whether torch has a varlen kernel with a causal window (torch >= 2.11)."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return False
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return version >= (2, 11)


def available_backends(device: torch.device | str, dtype: torch.dtype) -> list[Backend]:
    """The backends that can run on this device in this dtype, the fastest first."""
    half_on_cuda = torch.device(device).type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    backends: list[Backend] = []
    if half_on_cuda and has_flash_attn():
        backends.append("flash_attn")
    if half_on_cuda and has_torch_varlen():
        backends.append("torch")
    backends.append("sdpa")
    return backends


def choose_backend(requested: Backend | Literal["auto"], device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend to use.

    Raises:
        PolarError: The requested one cannot run here; the message says what could.
    """
    backends = available_backends(device, dtype)
    if requested == "auto":
        return backends[0]
    if requested not in backends:
        raise PolarError(
            f"attention backend {requested!r} cannot run on {device} in {dtype}; available: "
            f"{', '.join(backends)} (attention='auto' takes the first)"
        )
    return requested


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    layout: Pack,
    backend: Backend | Literal["auto"] = "auto",
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of every segment of a pack to its keys; called by transformers' attention layers.

    Args:
        module: The calling attention layer, unused.
        query: [1, heads, tokens, head_dim].
        key: [1, kv_heads, tokens, head_dim].
        value: [1, kv_heads, tokens, head_dim].
        attention_mask: None; the layout says who sees whom.
        layout: The pack.
        backend: See `choose_backend`.
        scaling: Factor of the scores; None takes 1 / sqrt(head_dim).
        dropout: Must be 0: reward training uses none.

    Returns:
        [1, tokens, heads, head_dim] and None (no attention weights).
    """
    if dropout:
        raise PolarError(f"attention dropout {dropout} is not supported in packed training; set it to 0")
    chosen = choose_backend(backend, query.device, query.dtype)
    if chosen == "sdpa":
        return _sdpa(query, key, value, layout, scaling), None

    q, k, v = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    if layout.key_index is not None:
        k, v = k.index_select(0, layout.key_index), v.index_select(0, layout.key_index)
    lengths = (layout.cu_seqlens_q, layout.cu_seqlens_k, max(layout.q_lengths), max(layout.k_lengths))
    if chosen == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        output = flash_attn_varlen_func(q, k, v, *lengths, softmax_scale=scaling, causal=True)
    else:
        output = _torch_varlen(q, k, v, *lengths, scaling)
    return output.unsqueeze(0), None


def _torch_varlen(q, k, v, cu_q, cu_k, max_q, max_k, scaling):
    from torch.nn.attention.varlen import varlen_attn

    groups = q.shape[1] // k.shape[1]
    if groups > 1:  # enable_gqa exists from torch 2.12; repeating is right in every version
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    contiguous = (states.contiguous() for states in (q, k, v))
    return varlen_attn(*contiguous, cu_q, cu_k, max_q, max_k, scale=scaling, window_size=(-1, 0))


def _sdpa(query, key, value, layout: Pack, scaling) -> torch.Tensor:
    """One SDPA call for each segment; [1, tokens, heads, head_dim]."""
    outputs = []
    q_start = k_start = 0
    for q_length, k_length in zip(layout.q_lengths, layout.k_lengths):
        q = query[:, :, q_start : q_start + q_length]
        if layout.key_index is None:
            keys = slice(q_start, q_start + q_length)
            k, v = key[:, :, keys], value[:, :, keys]
        else:
            index = layout.key_index[k_start : k_start + k_length]
            k, v = key.index_select(2, index), value.index_select(2, index)
        if q_length == k_length:
            mask = None
        else:  # bottom right: the last query sees every key
            mask = torch.ones(q_length, k_length, dtype=torch.bool, device=q.device).tril(k_length - q_length)
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
            )
        )
        q_start += q_length
        k_start += k_length
    return torch.cat(outputs, dim=2).transpose(1, 2)


ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION] = packed_attention
