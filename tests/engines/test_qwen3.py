"""Qwen3, which transformers 4.48 does not have, against the real one and a real vLLM."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from polar_ft.client import RewardModelClient
from polar_ft.conversion.huggingface import write_hf_folder
from polar_ft.groups import TokenGroup
from polar_ft.model.packing import build_pack
from polar_ft.model.reward_model import packed_rewards
from polar_ft.model.weights import load_backbone
from polar_ft.parity.inputs import parity_inputs
from polar_ft.scoring.scorer import RewardScorer
from polar_ft.template import PolarTemplate
from tests.engines.conftest import ENVIRONMENT, MAX_LENGTH, MAX_RESPONSE_LENGTH
from tests.engines.servers import vllm_server
from tests.engines.test_vllm import TOLERANCE

# Heads of 32 dimensions where hidden_size / heads is 16, and norms that are not 1.
MAKE = """
import json, sys
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
folder, vocab_size = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
config = Qwen3Config(vocab_size=vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                     num_attention_heads=4, num_key_value_heads=2, head_dim=32, rope_theta=5e5,
                     max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
model = Qwen3ForCausalLM(config).float().eval()
for name, parameter in model.named_parameters():
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        torch.nn.init.normal_(parameter, mean=1, std=0.5)
    elif parameter.dim() > 1:
        torch.nn.init.normal_(parameter, std=0.15)
model.save_pretrained(folder)
ids = torch.randint(10, vocab_size, (1, 60))
with torch.inference_mode():
    hidden = model.model(input_ids=ids).last_hidden_state
json.dump({"ids": ids[0].tolist(), "hidden": hidden[0].tolist()}, open(f"{folder}/hidden.json", "w"))
"""


@pytest.fixture(scope="module")
def base(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3ForCausalLM of the engines' transformers, with the tokenizer of the other model."""
    folder = tmp_path_factory.mktemp("qwen3") / "base"
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    python = Path(str(ENVIRONMENT), "bin", "python")
    subprocess.run([python, "-c", MAKE, str(folder), str(vocab_size)], check=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def exported(base: Path) -> Path:
    """A reward model of it, as `polar-ft convert` writes it."""
    decoder, _, _ = load_backbone(base, torch.float32)
    state = {f"llm.{name}": tensor for name, tensor in decoder.state_dict().items()}
    state["v_head.weight"] = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    template = PolarTemplate.from_pretrained(
        base, max_length=MAX_LENGTH, max_response_length=MAX_RESPONSE_LENGTH
    )
    out = base.with_name("exported")
    write_hf_folder(state, base_folder=base, out_dir=out, template=template, dtype=torch.float32)
    return out


def test_hidden_states_are_those_of_the_real_qwen3(base: Path):
    """Of every position: each beginning of the sequence is a candidate, and all share one tree."""
    real = json.loads((base / "hidden.json").read_text())
    decoder, head, _ = load_backbone(base, torch.float32)
    assert head is None
    ids, expected = np.array(real["ids"]), torch.tensor(real["hidden"])
    group = TokenGroup.of_sequences([ids[:length] for length in range(1, len(ids) + 1)])
    for layout in ("tree", "flat"):
        with torch.inference_mode():
            hidden = packed_rewards(decoder, lambda states: states, build_pack([group], layout))
        torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)


def test_a_real_vllm_scores_the_exported_model(exported: Path, tmp_path: Path):
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForSequenceClassification"]
    scorer = RewardScorer.from_pretrained(exported)
    rows = [row for item in parity_inputs(scorer.template, 30) for row in item.rows()]
    expected = scorer.score(rows)
    assert max(map(abs, expected)) > 5
    with (
        vllm_server(Path(str(ENVIRONMENT)), exported, tmp_path) as server,
        RewardModelClient(exported, server_type="vllm", server_address=server.address) as client,
    ):
        assert client(rows) == pytest.approx(expected, abs=TOLERANCE, rel=0)
