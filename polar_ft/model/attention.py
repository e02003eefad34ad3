"""Attention over a pack, by one of three backends that give the same result.

``flash_attn`` where it is installed, ``torch`` (``torch.nn.attention.varlen``) on CUDA in half precision,
and ``sdpa``, ``scaled_dot_product_attention`` over batches of segments of about one length, anywhere else.
None of them builds a tokens × tokens mask.

Who attends to whom arrives as an argument. That is the one way which survives activation checkpointing: a
global or a ContextVar is gone when backward recomputes in another thread.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from polar_ft.errors import PolarError
from polar_ft.model.packing import Segments

Backend = Literal["flash_attn", "torch", "sdpa"]


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
        PolarError: The requested one cannot run here, and the message says what could; or its kernel computes
            something else than causal attention aligned to the bottom right.
    """
    backends = available_backends(device, dtype)
    chosen = backends[0] if requested == "auto" else requested
    if chosen not in backends:
        raise PolarError(
            f"attention backend {requested!r} cannot run on {device} in {dtype}; available: "
            f"{', '.join(backends)} (attention='auto' takes the first)"
        )
    if chosen != "sdpa":
        check_kernel(chosen, str(device), dtype)
    return chosen


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    segments: Segments,
    backend: Backend | Literal["auto"] = "auto",
    scaling: float | None = None,
) -> torch.Tensor:
    """Causal attention of every segment of a pack to its keys, aligned to the bottom right.

    Args:
        query: [1, heads, queries, head_dim].
        key: [1, kv_heads, tokens, head_dim].
        value: [1, kv_heads, tokens, head_dim].
        segments: Who attends to whom.
        backend: See `choose_backend`.
        scaling: Factor of the scores; None takes 1 / sqrt(head_dim).

    Returns:
        [1, queries, heads, head_dim].
    """
    chosen = choose_backend(backend, query.device, query.dtype)
    if chosen == "sdpa":
        return _sdpa(query, key, value, segments, scaling)
    return _varlen(query, key, value, segments, scaling, KERNELS[chosen])


def _varlen(query, key, value, segments: Segments, scaling, kernel: Callable[..., torch.Tensor]):
    """One call of a varlen kernel for all segments; keys are gathered where they are shared."""
    q, k, v = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    if segments.key_index is not None:
        k, v = k.index_select(0, segments.key_index), v.index_select(0, segments.key_index)
    lengths = (segments.cu_seqlens_q, segments.cu_seqlens_k, max(segments.q_lengths), max(segments.k_lengths))
    return kernel(q, k, v, *lengths, scaling).unsqueeze(0)


@functools.cache
def check_kernel(backend: Backend, device: str, dtype: torch.dtype) -> None:
    """Compares a varlen kernel with SDPA on a small tree, once a device and dtype.

    Kernels differ in how they align a causal mask where a segment has more keys than queries: top left would
    hide most of the prefix, and training would continue with wrong gradients.

    Raises:
        PolarError: The two differ.
    """
    generator = torch.Generator().manual_seed(0)
    # A prefix of 5 tokens with branches of 3 and 1.
    keys = np.array([*range(5), *range(5), 5, 6, 7, *range(5), 8])
    segments = Segments.of([5, 3, 1], [5, 8, 6], keys).to(device)
    q, k, v = (torch.randn(1, heads, 9, 64, generator=generator).to(device, dtype) for heads in (4, 2, 2))
    with torch.no_grad():
        found = _varlen(q, k, v, segments, None, KERNELS[backend]).float()
        difference = (found - _sdpa(q, k, v, segments, None).float()).abs().max().item()
    if not difference <= 0.05:  # values of about 1, in half precision
        raise PolarError(
            f"attention backend {backend!r} on {device} in {dtype} does not compute causal attention aligned "
            f"to the bottom right (it differs by {difference:.2g}); set attention='sdpa', or install another "
            f"version of its package"
        )


def _flash_attn(q, k, v, cu_q, cu_k, max_q, max_k, scaling):
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scaling, causal=True)


def _torch_varlen(q, k, v, cu_q, cu_k, max_q, max_k, scaling):
    from torch.nn.attention.varlen import varlen_attn

    groups = q.shape[1] // k.shape[1]
    if groups > 1:  # enable_gqa exists from torch 2.12; repeating is right in every version
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    contiguous = (states.contiguous() for states in (q, k, v))
    return varlen_attn(*contiguous, cu_q, cu_k, max_q, max_k, scale=scaling, window_size=(-1, 0))


# (q, k, v, cu_seqlens_q, cu_seqlens_k, longest q, longest k, scaling) to [queries, heads, head_dim].
KERNELS: dict[str, Callable[..., torch.Tensor]] = {"flash_attn": _flash_attn, "torch": _torch_varlen}


@dataclass(frozen=True)
class _Bucket:
    """Segments of about the same shape, padded to one, for one call of SDPA.

    Attributes:
        count: Segments.
        q_index: [count × longest query] token of each padded query.
        k_index: [count × longest key] token of each padded key.
        mask: [count, 1, longest query, longest key], True where a query sees a key; None for one causal
            segment whose keys are its queries.
    """

    count: int
    q_index: torch.Tensor
    k_index: torch.Tensor
    mask: torch.Tensor | None


# A call of SDPA costs about as much as this many query-key pairs (2 CPU cores, 8 heads of 64).
_CALL_COST = 20_000


def sdpa_buckets(segments: Segments) -> tuple[list[_Bucket], torch.Tensor]:
    """Cuts the segments of a pack into padded batches, and where each token lies in their outputs.

    A call for each segment is dear where segments are short, one padded batch of all where they differ in
    length: a segment joins a batch while the padding costs less than the calls that are saved.
    """
    q_lengths, k_lengths = np.array(segments.q_lengths), np.array(segments.k_lengths)
    order = np.lexsort((k_lengths, q_lengths))[::-1]
    batches: list[list[int]] = []
    used = width = 0
    for segment in order:
        q, k = int(q_lengths[segment]), int(k_lengths[segment])
        if batches:
            first_q = int(q_lengths[batches[-1][0]])
            padded = (len(batches[-1]) + 1) * first_q * max(width, k)
            if padded - (used + q * k) <= _CALL_COST * len(batches[-1]):
                batches[-1].append(int(segment))
                used, width = used + q * k, max(width, k)
                continue
        batches.append([int(segment)])
        used, width = q * k, k

    q_starts = np.cumsum(q_lengths) - q_lengths
    k_starts = np.cumsum(k_lengths) - k_lengths
    keys = np.arange(k_lengths.sum()) if segments.key_index is None else segments.key_index.cpu().numpy()
    device = segments.cu_seqlens_q.device
    buckets = []
    place = np.empty(int(q_lengths.sum()), dtype=np.int64)
    offset = 0
    for batch in batches:
        q_each, k_each = q_lengths[batch, None], k_lengths[batch, None]
        row, column = np.arange(q_each.max()), np.arange(k_each.max())
        real = row < q_each
        place[(q_starts[batch, None] + row)[real]] = offset + np.flatnonzero(real)
        offset += real.size
        q_index = np.where(real, q_starts[batch, None] + row, 0)
        k_index = keys[np.where(column < k_each, k_starts[batch, None] + column, 0)]
        mask = None
        if len(batch) > 1 or q_each[0, 0] != k_each[0, 0]:
            # Bottom right: the last query sees every key. Padded queries see key 0, so that no
            # softmax is over an empty row.
            seen = np.where(real, row + k_each - q_each, 0)
            mask = torch.from_numpy(column <= seen[:, None, :, None]).to(device)
        buckets.append(
            _Bucket(
                len(batch),
                torch.from_numpy(q_index.reshape(-1)).to(device),
                torch.from_numpy(k_index.reshape(-1)).to(device),
                mask,
            )
        )
    return buckets, torch.from_numpy(place).to(device)


def _sdpa(query, key, value, segments: Segments, scaling) -> torch.Tensor:
    """[1, tokens, heads, head_dim]."""
    buckets, place = segments.cached("sdpa", sdpa_buckets)
    states = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]
    outputs = []
    for bucket in buckets:
        q, k, v = (
            x.index_select(0, index).unflatten(0, (bucket.count, -1)).transpose(1, 2)
            for x, index in zip(states, (bucket.q_index, bucket.k_index, bucket.k_index), strict=True)
        )
        output = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bucket.mask, is_causal=bucket.mask is None, scale=scaling, enable_gqa=True
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, place).unsqueeze(0)
