"""The published rankings, on a model made on the spot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from examples.rankings import rank
from polar_ft.model.tiny_base import make_tiny_base

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("name", "n"), [("capital", 2), ("strawberry", 7), ("rainy_idioms", 9)])
def test_the_data(name, n):
    ranking = rank.read_ranking(name)
    assert len(ranking.candidates) == n
    texts = [candidate.text for candidate in ranking.candidates]
    assert len(set(texts)) == n
    # The published model puts the reference itself first.
    assert texts[0] == ranking.reference
    assert max(candidate.published for candidate in ranking.candidates) == ranking.candidates[0].published


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from polar_ft.conversion.huggingface import write_hf_folder
    from polar_ft.model.weights import load_backbone
    from polar_ft.template import PolarTemplate

    folder = tmp_path_factory.mktemp("models")
    base = make_tiny_base(folder / "base", ["Three 'r's.", "三个成语"] * 20, vocab_size=300)
    decoder, _, _ = load_backbone(base, torch.float32)
    state = {f"llm.{key}": tensor for key, tensor in decoder.state_dict().items()}
    state["v_head.weight"] = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    template = PolarTemplate.from_pretrained(base, max_length=1000, max_response_length=250)
    write_hf_folder(state, base_folder=base, out_dir=folder / "hf", template=template, dtype=torch.float32)
    return folder / "hf"


def test_the_script_prints_every_candidate_beside_its_published_reward(model):
    command = [sys.executable, "examples/rankings/rank.py", "rainy_idioms", "--model", str(model)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    ranking = rank.read_ranking("rainy_idioms")
    for candidate in ranking.candidates:
        assert candidate.text in result.stdout
        assert f"{candidate.published:.3f}" in result.stdout
    rewards = rank.reward(str(model), None, ranking.rows())
    best = max(zip(rewards, ranking.candidates, strict=True), key=lambda pair: pair[0])[1]
    positions = [result.stdout.index(candidate.about) for candidate in ranking.candidates]
    assert min(positions) == result.stdout.index(best.about)
    assert "of 36 pairs in the published order" in result.stdout


def test_without_weights_the_demo_model_is_used_and_said_to_be(model, monkeypatch, capsys):
    from rich.console import Console

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(rank, "DEMO_MODEL", model)
    assert rank.default_model(Console()) == str(model)
    assert "this is the demo's model" in capsys.readouterr().out
    monkeypatch.setattr(rank, "DEMO_MODEL", model / "none")
    with pytest.raises(rank.PolarError, match="make demo"):
        rank.default_model(Console())
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "config.json")
    assert rank.default_model(Console()) == "internlm/POLAR-7B"
