"""Which layers are computed again: by the setting, or by what fits."""

from __future__ import annotations

import pytest
import torch

from polar_ft.model.memory import activation_bytes_per_token, layers_to_checkpoint
from polar_ft.training.model import PolarRewardModel
from tests.model.test_packed_forward import SIZES, make_model


def test_a_layer_keeps_what_its_tensors_take():
    decoder, _ = make_model("llama")
    bytes_per_token = activation_bytes_per_token(decoder)
    # In float32 at least the input, the queries, keys and values, the output of the attention, and gate, up
    # and their product of the MLP; and surely not ten times that.
    hidden, key_value, inner = SIZES["hidden_size"], SIZES["hidden_size"] // 2, SIZES["intermediate_size"]
    least = 4 * (3 * hidden + 2 * key_value + 3 * inner)
    assert least <= bytes_per_token <= 10 * least
    half = activation_bytes_per_token(decoder.to(torch.bfloat16))
    assert half < 0.75 * bytes_per_token


@pytest.mark.parametrize(
    ("free", "expected"),
    # Kept for a pack of 10 tokens, 4 layers of 100 bytes a token, inputs of 10: none again 4000; one again
    # 3 * 1000 + 100 + 1000 while it is computed = 4100; two 2000 + 200 + 1000 = 3200; three 2300; four 1400.
    [(4000, 0), (3999, 2), (3200, 2), (3199, 3), (2299, 4), (0, 4)],
)
def test_as_few_layers_as_fit(free: int, expected: int):
    sizes = dict(tokens=10, bytes_per_token=100, boundary_bytes=10, free_bytes=free)
    assert layers_to_checkpoint("auto", 4, **sizes) == expected


@pytest.mark.parametrize(
    ("mode", "tokens", "expected", "said"),
    [
        ("none", 10**12, 0, "activation_checkpointing='none'"),
        ("selective", 8, 1, "activation_checkpointing='selective'"),
        ("full", 8, 3, "activation_checkpointing='full'"),
        ("auto", 8, 0, "a pack has up to 8 tokens"),
        ("auto", 10**12, 3, "measured on one layer"),
    ],
)
def test_the_model_plans_what_its_setting_says(mode: str, tokens: int, expected: int, said: str):
    model = PolarRewardModel.__new__(PolarRewardModel)
    torch.nn.Module.__init__(model)
    model.llm, model.v_head = make_model("llama")
    model.adapter, model.activation_checkpointing = None, mode
    line = model.plan_checkpointing(tokens, unallocated_bytes=12)
    assert model.checkpointed_layers == expected
    assert line.startswith(f"{expected} of 3 layers are computed again in backward")
    assert said in line
