"""Fused kernels of liger-kernel for a decoder of transformers: RMSNorm, rotary embedding, SwiGLU.

The same mathematics in fewer passes over memory. Linkedin's Liger kernels (arXiv 2410.10989) are Triton
programs: they run on GPUs; on a CPU the decoder computes as before.
"""

from __future__ import annotations

import importlib.util
from types import MethodType
from typing import Any

import torch

from polar_ft.errors import PolarError
from polar_ft.model.backbones import MLPS, NORMS


def use_fused_kernels(decoder: Any) -> None:
    """Makes a decoder use the fused kernels wherever its tensors are on a GPU.

    Args:
        decoder: Of a family in `polar_ft.model.backbones`.

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
        if isinstance(module, NORMS):
            module.forward = MethodType(_fused_norm, module)
        elif isinstance(module, MLPS):
            module.forward = MethodType(_fused_mlp, module)
    for layer in decoder.layers:
        layer.self_attn.fused_rotary = _fused_rotary  # called by `run_layer`


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


def _fused_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary embedding of [1, heads, tokens, head_dim] with [1, tokens, head_dim]; on CUDA only."""
    from liger_kernel.ops.rope import LigerRopeFunction

    return LigerRopeFunction.apply(query, key, cos, sin)
