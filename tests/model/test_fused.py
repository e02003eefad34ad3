"""How fused kernels are put in. The kernels themselves are Triton programs and run on GPUs alone."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from polar_ft.errors import PolarError
from polar_ft.model import fused
from polar_ft.model.fused import use_fused_kernels
from polar_ft.model.packing import build_pack
from polar_ft.model.reward_model import packed_rewards
from tests.model.test_packed_forward import make_groups, make_model


@pytest.fixture
def installed(monkeypatch):
    """A package of that name, so that it is found; nothing of it may be called on a CPU."""
    module = ModuleType("liger_kernel")
    module.__spec__ = ModuleSpec("liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel", module)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_every_norm_mlp_and_rotation_is_replaced_and_a_cpu_computes_as_before(installed, kind: str):
    decoder, head = make_model(kind)
    pack = build_pack(make_groups())
    with torch.no_grad():
        before = packed_rewards(decoder, head, pack)
        use_fused_kernels(decoder)
        after = packed_rewards(decoder, head, pack)
    assert torch.equal(before, after)
    replaced = [m.forward.__func__ for m in decoder.modules() if hasattr(m.forward, "__func__")]
    assert replaced.count(fused._fused_norm) == (4 if kind == "qwen3" else 2) * 3 + 1  # and one at the end
    assert replaced.count(fused._fused_mlp) == 3
    assert all(layer.self_attn.fused_rotary is fused._fused_rotary for layer in decoder.layers)


def test_a_model_with_another_activation_is_refused(installed):
    decoder, _ = make_model("llama")
    decoder.config.hidden_act = "gelu"
    with pytest.raises(PolarError, match="is for SiLU models; this one has 'gelu'"):
        use_fused_kernels(decoder)


def test_without_liger_kernel_the_setting_is_refused(monkeypatch):
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PolarError, match="needs liger-kernel: pip install"):
        use_fused_kernels(make_model("llama")[0])
