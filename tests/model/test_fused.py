"""How fused kernels are put in. The kernels themselves are Triton programs and run on GPUs alone."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2

from polar_ft.errors import PolarError
from polar_ft.model import fused
from polar_ft.model.fused import use_fused_kernels
from tests.model.test_packed_forward import make_model


@pytest.fixture
def installed(monkeypatch):
    """A package of that name, so that it is found; nothing of it may be called on a CPU."""
    module = ModuleType("liger_kernel")
    module.__spec__ = ModuleSpec("liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel", module)
    for models in (modeling_llama, modeling_qwen2):
        monkeypatch.setattr(models, "apply_rotary_pos_emb", models.apply_rotary_pos_emb)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_every_norm_mlp_and_rotation_is_replaced_and_a_cpu_computes_as_before(installed, kind: str):
    decoder, _ = make_model(kind)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = decoder(input_ids=ids, use_cache=False)[0]
        use_fused_kernels(decoder)
        after = decoder(input_ids=ids, use_cache=False)[0]
    assert torch.equal(before, after)
    replaced = [m.forward.__func__ for m in decoder.modules() if hasattr(m.forward, "__func__")]
    assert replaced.count(fused._fused_norm) == 2 * 3 + 1  # two a layer, one at the end
    assert replaced.count(fused._fused_mlp) == 3
    models = modeling_llama if kind == "llama" else modeling_qwen2
    rotary = models.apply_rotary_pos_emb
    use_fused_kernels(decoder)
    assert models.apply_rotary_pos_emb is rotary, "replaced once, however many models there are"


def test_a_model_with_another_activation_is_refused(installed):
    decoder, _ = make_model("llama")
    decoder.config.hidden_act = "gelu"
    with pytest.raises(PolarError, match="is for SiLU models; this one has 'gelu'"):
        use_fused_kernels(decoder)


def test_without_liger_kernel_the_setting_is_refused(monkeypatch):
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PolarError, match="needs liger-kernel: pip install"):
        use_fused_kernels(make_model("llama")[0])
