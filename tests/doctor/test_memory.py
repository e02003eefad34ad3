"""Estimates against arithmetic by hand, and against the real model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polar_ft.doctor.memory import (
    RESERVED,
    STRATEGIES,
    Activations,
    ModelSize,
    Strategy,
    estimate,
    layer_activations,
    model_size,
)
from polar_ft.model.memory import activation_bytes_per_token
from polar_ft.model.settings import LoraSettings
from polar_ft.model.weights import load_backbone
from polar_ft.training.lora import add_adapters

SIZE = ModelSize(1000, 1000, 0, largest=100, layers=4, hidden_size=8, intermediate_size=16)
NOTHING_KEPT = Activations(0, layer_bytes=0, boundary_bytes=0, temporary_bytes=0, layers=4)


def test_zero2_on_four_gpus_by_hand() -> None:
    found = estimate("zero2", SIZE, NOTHING_KEPT, gpus=4, available=None, bucket=10)
    # bfloat16 weights 2 · 1000; a quarter of 2 · 1000; a quarter of 4 + 4 + 4; two buckets of 10 bfloat16
    assert (found.weights, found.gradients, found.optimizer, found.buffers) == (2000, 500, 3000, 40)
    # weights, optimizer, the gradient in float32 and AdamW's square root, a quarter each
    assert found.update == 2000 + 3000 + 1000 + 1000
    assert found.peak == 7000 + RESERVED


def test_zero3_divides_the_weights_too() -> None:
    found = estimate("zero3", SIZE, NOTHING_KEPT, gpus=4, available=None, bucket=10)
    assert (found.weights, found.gradients, found.optimizer) == (500, 500, 3000)
    assert found.buffers == 2000 + 20  # all parameters gathered, for they are few; one bucket


def test_offload_moves_all_of_it_to_the_machine() -> None:
    found = estimate("zero3_offload", SIZE, NOTHING_KEPT, gpus=4, available=None, bucket=10)
    assert found.weights == found.gradients == found.optimizer == found.update == 0
    # of all four: weights 2, gradients 2, optimizer 12, and 12 more while AdamW runs
    assert found.host == 28 * 1000


@pytest.mark.parametrize(("gpus", "buckets"), [(1, 0), (2, 4000)])
def test_plain_training_holds_float32_and_its_copies(gpus: int, buckets: int) -> None:
    found = estimate("none", SIZE, NOTHING_KEPT, gpus=gpus, available=None)
    assert (found.weights, found.gradients, found.optimizer) == (4000, 4000, 8000)
    assert found.buffers == buckets + 2000  # DistributedDataParallel's, and autocast's bfloat16 weights
    assert found.update == 16000 + buckets + 4000  # AdamW's square roots


def test_frozen_weights_have_neither_gradients_nor_optimizer() -> None:
    size = ModelSize(1000, 100, 640, largest=100, layers=4, hidden_size=8, intermediate_size=16)
    found = estimate("none", size, NOTHING_KEPT, gpus=1, available=None, base_bytes=2)
    # 100 trained in float32, 260 frozen in bfloat16, 640 in four bits with a scale for each 64
    assert found.weights == 400 + 520 + 320 + 40
    assert (found.gradients, found.optimizer) == (400, 800)


def test_layers_are_recomputed_as_far_as_is_needed() -> None:
    activations = Activations(10, layer_bytes=100, boundary_bytes=10, temporary_bytes=0, layers=4)
    held = estimate("none", SIZE, NOTHING_KEPT, gpus=1, available=None).backward
    roomy, tight, least = (
        estimate("none", SIZE, activations, gpus=1, available=RESERVED + held + free)
        for free in (8000, 3700, 0)
    )
    assert (roomy.recomputed_layers, roomy.activations) == (0, 4000)
    # 85 % of 3700 is 3145: with two layers again, 2 · 1000 kept + 2 · 100 inputs + 1000 again = 3200 is more
    assert (tight.recomputed_layers, tight.activations) == (3, 1000 + 300 + 1000)
    assert (least.recomputed_layers, least.activations) == (4, 400 + 1000)


@given(
    strategy=st.sampled_from(STRATEGIES),
    gpus=st.integers(2, 512),
    tokens=st.integers(1, 32768),
    parameters=st.integers(1000, 10**10),
)
def test_more_gpus_never_take_more_on_each(
    strategy: Strategy, gpus: int, tokens: int, parameters: int
) -> None:
    size = ModelSize(parameters, parameters, 0, 100, layers=4, hidden_size=8, intermediate_size=16)
    activations = Activations(tokens, layer_bytes=100, boundary_bytes=10, temporary_bytes=5, layers=4)
    few, many = (estimate(strategy, size, activations, gpus=n, available=None) for n in (gpus, 2 * gpus))
    assert many.peak <= few.peak
    assert few.peak >= few.activations


def test_sizes_are_those_of_the_real_model(project: Path) -> None:
    hf_config = json.loads((project / "base" / "config.json").read_text())
    decoder, _, _ = load_backbone(project / "base")
    head = decoder.config.hidden_size
    assert model_size(hf_config).parameters == sum(p.numel() for p in decoder.parameters()) + head
    assert layer_activations(hf_config, torch.float32) == activation_bytes_per_token(decoder)

    lora = LoraSettings(r=3, alpha=6, target_modules=("q_proj", "down_proj"))
    add_adapters(decoder, lora, "base")
    size = model_size(hf_config, lora)
    assert size.trainable == sum(p.numel() for p in decoder.parameters() if p.requires_grad) + head
    assert size.parameters == sum(p.numel() for p in decoder.parameters()) + head
    assert layer_activations(hf_config, torch.float32, lora) == activation_bytes_per_token(decoder)
