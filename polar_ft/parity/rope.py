"""Dynamic-NTK RoPE, which inference engines compute in two ways.

Transformers leaves the base of the rotary embedding alone up to ``max_position_embeddings`` and raises it
beyond. SGLang 0.5.23, and vLLM before its pull request 41277 (spring 2026), raise it once and for all, as for
a text of ``factor * max_position_embeddings`` tokens, and so change every reward. POLAR-7B is such a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


def always_scaled_base(config: Mapping[str, Any]) -> float | None:
    """The base that an engine takes which always scales it; None where the model has no dynamic scaling.

    The formula of dynamic NTK (transformers 4.48.0, ``modeling_rope_utils``) at the engines' fixed length
    L = factor · M, with M = ``max_position_embeddings``: base · (factor · L / M − factor + 1)^(d / (d − 2)).

    POLAR-7B, 5e7 becomes about 1.5e8:

    >>> config = dict(rope_scaling=dict(type="dynamic", factor=2.0), rope_theta=5e7, hidden_size=4096,
    ...               num_attention_heads=32, max_position_embeddings=262144)
    >>> f"{always_scaled_base(config):.3g}"
    '1.53e+08'

    Args:
        config: ``config.json`` of the model.
    """
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type")) != "dynamic":
        return None
    factor = float(scaling["factor"])
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return config.get("rope_theta", 10000) * (factor * factor - factor + 1) ** (dim / (dim - 2))


@contextmanager
def rope_base(decoder: Any, base: float) -> Iterator[None]:
    """The decoder with another base of its rotary embedding, inside the block.

    Args:
        decoder: ``LlamaModel`` or ``Qwen2Model``.
        base: Of the rotary embedding; holds up to ``max_position_embeddings`` tokens.
    """
    rotary = decoder.rotary_emb
    before = rotary.inv_freq
    exponents = torch.arange(0, 2 * len(before), 2, device=before.device, dtype=torch.float32)
    rotary.inv_freq = 1.0 / base ** (exponents / (2 * len(before)))
    try:
        yield
    finally:
        rotary.inv_freq = before
