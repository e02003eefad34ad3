"""Fused kernels of liger-kernel for a decoder of transformers: RMSNorm, rotary embedding, SwiGLU.

The same mathematics in fewer passes over memory. Linkedin's Liger kernels (arXiv 2410.10989) are Triton
programs: they run on GPUs; on a CPU the decoder keeps computing as it does.
"""

from __future__ import annotations

import importlib.util
from types import MethodType
from typing import Any

import torch
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2

from polar_ft.errors import PolarError

_NORMS = (modeling_llama.LlamaRMSNorm, modeling_qwen2.Qwen2RMSNorm)
_MLPS = (modeling_llama.LlamaMLP, modeling_qwen2.Qwen2MLP)


def use_fused_kernels(decoder: Any) -> None:
    """Makes a decoder use the fused kernels wherever its tensors are on a GPU.

    Args:
        decoder: ``LlamaModel`` or ``Qwen2Model``.

    Raises:
        PolarError: liger-kernel is not installed, or the activation is not SiLU.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise PolarError(
            "fused_kernels=True needs liger-kernel: pip install liger-kernel, or set it to False"
        )
    if decoder.config.hidden_act != "silu":
        raise PolarError(f"fused_kernels=True is for SiLU models; this one has {decoder.config.hidden_act!r}")
    for module in decoder.modules():
        if isinstance(module, _NORMS):
            module.forward = MethodType(_fused_norm, module)
        elif isinstance(module, _MLPS):
            module.forward = MethodType(_fused_mlp, module)
    # transformers calls its rotary function by its global name, so it is replaced there, once.
    for models in (modeling_llama, modeling_qwen2):
        if not hasattr(models.apply_rotary_pos_emb, "unfused"):
            models.apply_rotary_pos_emb = _fused_rotary(models.apply_rotary_pos_emb)


def _fused_norm(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    if not hidden.is_cuda:
        return type(norm).forward(norm, hidden)
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(hidden, norm.weight, norm.variance_epsilon, 0.0, "llama", False)


def _fused_mlp(mlp: Any, hidden: torch.Tensor) -> torch.Tensor:
    if not hidden.is_cuda:
        return type(mlp).forward(mlp, hidden)
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return mlp.down_proj(LigerSiLUMulFunction.apply(mlp.gate_proj(hidden), mlp.up_proj(hidden)))


def _fused_rotary(unfused):
    def apply_rotary_pos_emb(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
        if not q.is_cuda:
            return unfused(q, k, cos, sin, position_ids, unsqueeze_dim)
        from liger_kernel.ops.rope import LigerRopeFunction

        return LigerRopeFunction.apply(q, k, cos, sin, position_ids, unsqueeze_dim)

    apply_rotary_pos_emb.unfused = unfused
    return apply_rotary_pos_emb
