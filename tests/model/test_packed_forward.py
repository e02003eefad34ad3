"""Packed forward: rewards and gradients equal those of separate sequences run by transformers itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

from polar_ft.errors import PolarError
from polar_ft.groups import TokenGroup
from polar_ft.model.attention import available_backends, choose_backend
from polar_ft.model.backbones import Qwen3Config, Qwen3Model
from polar_ft.model.losses import pair_loss, pair_penalty
from polar_ft.model.packing import build_pack
from polar_ft.model.reward_model import RewardHead, packed_rewards, refuse_unknown_layers

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)


def make_model(kind: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    if kind == "qwen2":
        decoder = Qwen2Model(Qwen2Config(**SIZES))
    elif kind == "qwen3":  # heads whose size is not hidden_size / heads
        decoder = Qwen3Model(Qwen3Config(**SIZES, head_dim=12))
        for layer in decoder.layers:
            torch.nn.init.normal_(layer.self_attn.q_norm.weight, mean=1, std=0.3)
            torch.nn.init.normal_(layer.self_attn.k_norm.weight, mean=1, std=0.3)
    else:
        rope = {"rope_type": "dynamic", "factor": 2.0} if kind == "llama_dynamic_rope" else None
        decoder = LlamaModel(LlamaConfig(**SIZES, rope_scaling=rope))
    head = RewardHead(SIZES["hidden_size"])
    return decoder.to(dtype), head.to(dtype)


def make_groups(seed: int = 0) -> list[TokenGroup]:
    rng = np.random.default_rng(seed)
    groups = []
    for branches, pairs in ((2, [[0, 1]]), (4, [[0, 1], [1, 2], [0, 3], [2, 3]]), (3, [[2, 0], [1, 0]])):
        prefix = rng.integers(0, 64, rng.integers(1, 20))
        groups.append(
            TokenGroup(
                prefix,
                [rng.integers(0, 64, rng.integers(1, 9)) for _ in range(branches)],
                np.array(pairs),
                rng.random(len(pairs)).astype(np.float32),
                np.ones(len(pairs), dtype=np.float32),
            )
        )
    return groups


def one_by_one(decoder, head, groups):
    """What transformers gives for every candidate alone."""
    decoder.config._attn_implementation = "sdpa"
    rewards = []
    for group in groups:
        for branch in group.branches:
            ids = torch.from_numpy(np.concatenate([group.prefix, branch]))[None]
            rewards.append(head(decoder(input_ids=ids, use_cache=False)[0][:, -1])[0])
    return torch.stack(rewards)


@pytest.mark.parametrize("kind", ["llama", "llama_dynamic_rope", "qwen2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_tree_and_flat_equal_separate_sequences(kind, checkpointing):
    decoder, head = make_model(kind)
    groups = make_groups()
    weights = torch.linspace(-1, 1, 9)
    expected = one_by_one(decoder, head, groups)
    (expected * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in decoder.named_parameters()}
    no_pairs = [TokenGroup(g.prefix, g.branches, g.pairs[:0], g.margins[:0], g.weights[:0]) for g in groups]

    for layout in ("tree", "flat"):
        decoder.zero_grad(), head.zero_grad()
        rewards = packed_rewards(
            decoder, head, build_pack(no_pairs, layout), checkpointed_layers=9 * checkpointing
        )
        torch.testing.assert_close(rewards, expected, rtol=1e-5, atol=1e-6)
        (rewards * weights).sum().backward()
        for name, parameter in decoder.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_pairs_of_tree_and_flat_are_the_same_pairs():
    decoder, head = make_model("llama")
    groups = make_groups(1)
    tree, flat = build_pack(groups), build_pack(groups, "flat")
    assert len(flat.input_ids) == tree.flat_tokens == sum(group.flat_tokens() for group in groups)
    rewards = {
        layout: packed_rewards(decoder, head, pack) for layout, pack in (("tree", tree), ("flat", flat))
    }
    for side in ("chosen", "rejected"):
        torch.testing.assert_close(rewards["tree"][getattr(tree, side)], rewards["flat"][getattr(flat, side)])
    torch.testing.assert_close(tree.margin, flat.margin)


def test_an_empty_pack_gives_zero_gradients_everywhere():
    decoder, head = make_model("llama")
    pack = build_pack([], filler_id=3)
    rewards = packed_rewards(decoder, head, pack)
    loss = (pair_loss(rewards[pack.chosen], rewards[pack.rejected], pack.margin) * pack.weight).sum()
    loss.backward()
    assert loss.item() == 0
    for parameter in [*decoder.parameters(), *head.parameters()]:
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_head_computes_in_float32_for_half_precision():
    decoder, head = make_model("llama", torch.bfloat16)
    rewards = packed_rewards(decoder, head, build_pack(make_groups()))
    assert rewards.dtype == torch.float32
    assert not torch.equal(rewards, rewards.to(torch.bfloat16).float())


def test_every_backend_present_gives_the_same():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    decoder, head = make_model("llama", dtype)
    decoder, head = decoder.to(device), head.to(device)
    pack = build_pack(make_groups()).to(device)
    results = {
        backend: packed_rewards(decoder, head, pack, backend=backend)
        for backend in available_backends(device, dtype)
    }
    assert "sdpa" in results
    for rewards in results.values():
        torch.testing.assert_close(rewards, results["sdpa"], rtol=2e-2, atol=2e-2)


def test_a_backend_that_cannot_run_is_named():
    with pytest.raises(PolarError, match=r"'flash_attn' cannot run on cpu.*available: sdpa"):
        choose_backend("flash_attn", torch.device("cpu"), torch.float32)


def test_losses_are_those_of_xtuner():
    from xtuner.model.reward import RewardModel

    chosen, rejected = torch.randn(20) * 4, torch.randn(20) * 4
    none = torch.zeros(20)
    ours = pair_loss(chosen, rejected, none, "ranking").sum()
    torch.testing.assert_close(ours, RewardModel.ranking_loss(None, chosen, rejected, 1))
    ours = pair_loss(chosen, rejected, none, "focal").sum()
    torch.testing.assert_close(ours, RewardModel.focal_loss(None, chosen, rejected, 1))
    both = torch.cat([chosen, rejected])
    ours = pair_penalty(chosen, rejected, "log_barrier").sum()
    torch.testing.assert_close(ours, RewardModel.log_barrier_penalty(None, both, -5, 5))
    ours = pair_penalty(chosen, rejected, "L2").sum()
    torch.testing.assert_close(ours, RewardModel.l2_penalty(None, both))
    assert not pair_penalty(chosen, rejected, "none").any()


def test_margin_loss_by_hand():
    # log(1 + e^-(3 - 1 - 0.5)) = log(1 + e^-1.5) = 0.2014
    loss = pair_loss(torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([0.5]), "margin")
    assert loss.item() == pytest.approx(0.2014, abs=1e-4)


def test_qwen3_as_a_tree_is_qwen3_one_by_one():
    """Against the real Qwen3Model: tests/engines/test_qwen3.py."""
    decoder, head = make_model("qwen3")
    groups = make_groups()
    tree = packed_rewards(decoder, head, build_pack(groups))
    alone = [
        packed_rewards(decoder, head, build_pack([TokenGroup.of_sequences([sequence])]))
        for group in groups
        for sequence in group.sequences
    ]
    torch.testing.assert_close(tree, torch.cat(alone), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        decoder.layers[1].self_attn.k_norm.weight *= 2
    assert not torch.allclose(packed_rewards(decoder, head, build_pack(groups)), tree, rtol=1e-3)
    with pytest.raises(NotImplementedError):
        decoder(input_ids=torch.arange(3)[None])


@pytest.mark.parametrize(
    ("place", "part"), [("self_attn", "sinks"), ("mlp", "router"), ("", "post_feedforward_layernorm")]
)
def test_a_layer_with_an_unknown_part_is_refused_by_name(place, part):
    decoder, _ = make_model("llama")
    refuse_unknown_layers(decoder, "model")
    module = decoder.layers[2].get_submodule(place)
    module.register_parameter(part, torch.nn.Parameter(torch.zeros(2)))
    where = ".".join(filter(None, ("layers.2", place, part)))
    with pytest.raises(PolarError, match=rf"model: {where} \(Parameter\) is not known to polar_ft"):
        refuse_unknown_layers(decoder, "model")
