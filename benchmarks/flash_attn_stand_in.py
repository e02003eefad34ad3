"""A module ``flash_attn`` for machines without flash-attention: its varlen function, by torch's own kernel.

xtuner 0.2.0 trains packed sequences only with flash-attention, which has no wheel for every torch. The kernel
of ``torch.nn.attention.varlen`` is flash-attention's, so the comparison stays one of like with like.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types


def install() -> None:
    """Puts the stand-in into ``sys.modules`` where flash-attention is not installed."""
    try:
        import flash_attn  # noqa: F401

        return
    except ImportError:
        pass
    from torch.nn.attention.varlen import varlen_attn

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, **_,
    ):  # fmt: skip
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return varlen_attn(
            q.contiguous(), k.contiguous(), v.contiguous(),
            cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            scale=softmax_scale, window_size=(-1, 0) if causal else (-1, -1),
        )  # fmt: skip

    def missing(*_, **__):
        raise NotImplementedError("the stand-in for flash_attn has the varlen function only")

    package = types.ModuleType("flash_attn")
    package.__version__ = "2.7.0"
    package.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None, is_package=True)
    package.__path__ = []
    package.flash_attn_varlen_func = flash_attn_varlen_func
    package.flash_attn_func = missing
    padding = types.ModuleType("flash_attn.bert_padding")
    padding.index_first_axis = padding.pad_input = padding.unpad_input = missing
    sys.modules["flash_attn"] = package
    sys.modules["flash_attn.bert_padding"] = padding
