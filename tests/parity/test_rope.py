"""Dynamic-NTK RoPE as engines compute it."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaModel

from polar_ft.parity.measure import always_scaled_base, rope_base

CONFIG = {
    "rope_scaling": {"type": "dynamic", "factor": 3.0},
    "rope_theta": 10000,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 100,
}


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 2.0}, {}])
def test_only_dynamic_scaling_has_two_readings(scaling):
    assert always_scaled_base({**CONFIG, "rope_scaling": scaling}) is None


def test_base_is_that_of_a_text_of_factor_times_the_positions():
    """Against transformers' own formula, at the length that engines take: 3 · 100 tokens."""
    base = always_scaled_base(CONFIG)
    config = LlamaConfig(**{**CONFIG, "rope_scaling": {"rope_type": "dynamic", "factor": 3.0}})
    frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=300)
    ours = 1 / base ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(ours, frequencies, rtol=1e-5, atol=0)


def test_the_base_is_changed_and_changed_back():
    decoder = LlamaModel(
        LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    )
    before = decoder.rotary_emb.inv_freq.clone()
    with rope_base(decoder, 10000.0):
        torch.testing.assert_close(decoder.rotary_emb.inv_freq, before)
    with rope_base(decoder, 50.0):
        assert decoder.rotary_emb.inv_freq[1] == pytest.approx(50 ** (-2 / 16))
    assert torch.equal(decoder.rotary_emb.inv_freq, before)
