"""Reward models of a given shape with random weights, in the published format."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def write_random_reward_model(
    folder: Path, shape: dict[str, Any], reward_token_id: int, seed: int = 0
) -> None:
    """Writes ``config.json``, model code and one shard of random weights; bfloat16 above 1B parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    dtype = torch.bfloat16 if hidden >= 2048 else torch.float32
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=generator) * hidden**-0.5).to(dtype)

    weights = {"model.tok_embeddings.weight": normal(shape["vocab_size"], hidden)}
    for layer in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        weights |= {
            f"{prefix}attention.wqkv.weight": normal((heads + 2 * kv_heads) * (hidden // heads), hidden),
            f"{prefix}attention.wo.weight": normal(hidden, hidden),
            f"{prefix}feed_forward.w1.weight": normal(inner, hidden),
            f"{prefix}feed_forward.w3.weight": normal(inner, hidden),
            f"{prefix}feed_forward.w2.weight": normal(hidden, inner),
            f"{prefix}attention_norm.weight": torch.ones(hidden, dtype=dtype),
            f"{prefix}ffn_norm.weight": torch.ones(hidden, dtype=dtype),
        }
    weights["model.norm.weight"] = torch.ones(hidden, dtype=dtype)
    weights["v_head.weight"] = normal(1, hidden)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = dict(
        shape,
        model_type="internlm2",
        architectures=["InternLM2ForRewardModel"],
        auto_map={
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModel": "modeling_internlm2.InternLM2ForRewardModel",
        },
        bias=False,
        hidden_act="silu",
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        rope_theta=1_000_000,
        rope_scaling={"type": "dynamic", "factor": 2.0},
        pad_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
        reward_token_id=reward_token_id,
        pretraining_tp=1,
        torch_dtype=str(dtype).removeprefix("torch."),
    )
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    spec = find_spec("xtuner")
    code = Path(spec.origin).parent / "tools" / "model_converters" / "modeling_internlm2_reward"
    for name in ("configuration_internlm2.py", "modeling_internlm2.py"):
        shutil.copyfile(code / name, folder / name)
