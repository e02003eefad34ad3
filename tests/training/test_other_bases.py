"""Llama and Qwen2 bases: POLAR's tokens are added; the result loads as …ForSequenceClassification."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from polar_ft.data.records import parse_row
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
