"""Llama, Qwen2 and Qwen3 bases: POLAR's tokens are added; the result is a …ForSequenceClassification."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from polar_ft.data.records import parse_row
from polar_ft.model.backbones import Qwen3Config, Qwen3Model
from polar_ft.scoring.scorer import RewardScorer
from tests.encoding import encode, ids_of
from tests.training.conftest import STEPS, TOP_LINES
from tests.training.runs import REPOSITORY, edit_config, make_rows

BASES = {"Llama": (LlamaConfig, LlamaForCausalLM), "Qwen2": (Qwen2Config, Qwen2ForCausalLM)}


def _make_base(folder: Path, kind: str, tokenizer_json: str) -> Path:
    """A random model with a tokenizer that knows neither of POLAR's tokens."""
    for token in ("<|reward|>", "[UNUSED_TOKEN_130]"):
        tokenizer_json = tokenizer_json.replace(token, f"<other {len(token)}>")
    config_class, model_class = BASES[kind]
    torch.manual_seed(0)
    config = config_class(
        vocab_size=Tokenizer.from_str(tokenizer_json).get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
    )
    model_class(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer_json)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
    )
    return folder


@pytest.mark.parametrize("kind", BASES)
def test_train_convert_and_load(project, run_once, kind, tmp_path):
    base = project / f"base_{kind}"
    if not base.exists():
        _make_base(base, kind, (project / "base" / "tokenizer.json").read_text())
    tokens = dict(separator="<|reward|>", reward="[UNUSED_TOKEN_130]", add=True)
    paths = dict(pretrained_model_name_or_path=str(base), data=str(project / "rows.jsonl"))
    config = edit_config(
        "polar_tiny_cpu.py", project / f"{kind}.py", **TOP_LINES, **paths, reward_tokens=tokens
    )
    ended = run_once(kind, "polar-ft", "train", str(config))
    assert ended.status == 0, ended.tail
    assert ended.checkpoint.name == f"iter_{STEPS}.pth"

    out = tmp_path / "hf"
    tool = [sys.executable, REPOSITORY / "tools" / "pth_to_hf.py", config, ended.checkpoint, out]
    subprocess.run(list(map(str, tool)), check=True)
    assert json.loads((out / "config.json").read_text())["architectures"] == [
        f"{kind}ForSequenceClassification"
    ]

    scorer = RewardScorer.from_pretrained(out)
    size = json.loads((base / "config.json").read_text())["vocab_size"]
    assert (scorer.template.separator_id, scorer.template.reward_token_id) == (size, size + 1)
    examples = [parse_row(row).to_example("rows.jsonl:1") for row in make_rows(5)]
    rewards = scorer.score_examples(examples)
    assert min(abs(reward) for row in rewards for reward in row) > 1e-3  # a trained head, not one of zeros

    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert model.config.num_labels == 1
    for example, scored in zip(examples, rewards, strict=True):
        encoded = encode(scorer.template, example.prompt, example.reference, example.candidates)
        for ids, reward in zip(ids_of(encoded), scored, strict=True):
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([ids])).logits
            assert logits.item() == pytest.approx(reward, abs=1e-5)


def _make_qwen3(folder: Path, tokenizer_json: str) -> Path:
    """A random base of our own class: this environment's transformers has no Qwen3 (tests/engines has)."""
    vocab_size = Tokenizer.from_str(tokenizer_json).get_vocab_size()
    sizes = dict(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    decoder = Qwen3Model(Qwen3Config(**sizes))
    folder.mkdir()
    config = sizes | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    state = {f"model.{name}": tensor for name, tensor in decoder.state_dict().items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "tokenizer.json").write_text(tokenizer_json)
    return folder


@pytest.mark.parametrize(
    ("name", "deepspeed", "lora"),
    [
        ("plain", (), None),
        ("zero2", ("--deepspeed", "deepspeed_zero2"), None),
        ("lora", (), dict(r=4, alpha=8)),
    ],
)
def test_qwen3_trains_and_converts(project, run_once, tmp_path, name, deepspeed, lora):
    base = project / "base_qwen3"
    with FileLock(f"{base}.lock"):
        if not base.exists():
            _make_qwen3(base, (project / "base" / "tokenizer.json").read_text())
    paths = dict(pretrained_model_name_or_path=str(base), data=str(project / "rows.jsonl"))
    config = edit_config("polar_tiny_cpu.py", project / f"qwen3_{name}.py", **TOP_LINES, **paths, lora=lora)
    ended = run_once(f"qwen3_{name}", "polar-ft", "train", str(config), *deepspeed)
    assert ended.status == 0, ended.tail
    losses = ended.scalars("loss")
    assert losses[STEPS] < losses[1]

    out = tmp_path / "hf"
    tool = [sys.executable, REPOSITORY / "tools" / "pth_to_hf.py", config, ended.checkpoint, out]
    tool += ["--dtype", "float32", "--verify", project / "rows.jsonl"]
    subprocess.run(list(map(str, tool)), check=True)
    written = json.loads((out / "config.json").read_text())
    assert (written["architectures"], written["model_type"]) == (["Qwen3ForSequenceClassification"], "qwen3")
    assert written["head_dim"] == 16
    tensors = load_file(out / "model.safetensors")
    assert tensors["model.layers.1.self_attn.q_norm.weight"].shape == (16,)
    assert tensors["score.weight"].any()
