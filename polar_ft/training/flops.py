"""Operations of a training step, and of the GPUs it may run on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from polar_ft.groups import Layout, TokenGroup

# Dense bfloat16, operations a second, from NVIDIA's data sheets.
PEAK_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


def token_flops(config: Mapping[str, Any], *, frozen: bool = False) -> int:
    """Operations of forward and backward for one token, without attention to other tokens.

    Six for each weight of the layers' matrices: two forward, two backward to the layer's input and two to
    the weight (Kaplan et al., arXiv 2001.08361, section 2.1). The embedding is a look-up, and reward head
    and LoRA adapters are too small to count.

    Args:
        config: Sizes of the model.
        frozen: The matrices get no gradient, as under LoRA.

    >>> sizes = dict(hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    ...              num_key_value_heads=1)
    >>> token_flops(sizes), token_flops(sizes, frozen=True)  # 6, 4 · (q 16 + k 8 + v 8 + o 16 + 3 · 32)
    (864, 576)
    """
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    weights = config["num_hidden_layers"] * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    return (4 if frozen else 6) * weights


def attention_flops(config: Mapping[str, Any], attended: float) -> float:
    """Operations of forward and backward of attention, causal: what is masked is not counted.

    Each query-key pair costs two products of ``hidden_size`` forward, twice that backward, in every layer
    (Chowdhery et al., arXiv 2204.02311, appendix B, which counts all pairs).

    Args:
        config: Sizes of the model.
        attended: Query-key pairs.
    """
    return 12 * config["num_hidden_layers"] * config["hidden_size"] * attended


def step_flops(config: Mapping[str, Any], groups: Sequence[TokenGroup], layout: Layout) -> float:
    """Operations of forward and backward for groups, recomputation not counted.

    Counts all layers for all tokens, also the last one, which computes less: the figure is what the plain
    model needs, so that leaving work out shows as speed.

    Args:
        config: Sizes of the model.
        groups: What is computed.
        layout: "tree" or "flat".
    """
    tokens = sum(g.tree_tokens() if layout == "tree" else g.flat_tokens() for g in groups)
    attended = sum(g.attended(layout) for g in groups)
    return token_flops(config) * tokens + attention_flops(config, attended)
