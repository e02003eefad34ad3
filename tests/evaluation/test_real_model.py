"""The whole command on a model folder that transformers wrote, against transformers' own scores."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from polar_ft.template import PolarTemplate
from tests.encoding import encode, ids_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOOL = Path(__file__).parents[2] / "tools" / "eval_preference.py"


@pytest.fixture
def llama_reward(model_dir):
    """A random Llama with a reward head, in the tokenizer's folder."""
    torch.manual_seed(0)
    template = PolarTemplate.from_pretrained(model_dir)
    config = transformers.LlamaConfig(
        vocab_size=len(template),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        num_labels=1,
        initializer_range=0.3,  # scores that differ by more than rounding
    )
    model = transformers.LlamaForSequenceClassification(config).eval()
    model.save_pretrained(model_dir)
    return model


def run_tool(monkeypatch, *arguments):
    monkeypatch.chdir(arguments[1].parent)
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(TOOL), run_name="__main__")
    return exit.value.code or 0


def test_scores_are_those_of_transformers(llama_reward, model_dir, write_rows, tmp_path, monkeypatch):
    rows = [
        {
            "prompt": f"Question {row}: " + "why? " * (row % 7),
            "reference": "Because. " * (row % 5),
            "chosen": f"Since {row}.",
            "rejected": "No idea! " * (1 + row % 3),
        }
        for row in range(30)
    ]
    data = write_rows(rows)
    # Few tokens a batch, so that there are several batches.
    options = ("--out", tmp_path / "out", "--batch-tokens", 300, "--shuffle-references", 3)
    assert run_tool(monkeypatch, model_dir, data, *options) == 0

    template = PolarTemplate.from_pretrained(model_dir)

    def by_transformers(row, reference):
        encoded = encode(template, row["prompt"], reference, [row["chosen"], row["rejected"]])
        # The last hidden state through the head; the model's own pooling needs a pad token.
        with torch.inference_mode():
            hidden = [
                llama_reward.model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in ids_of(encoded)
            ]
            return [llama_reward.score(state).item() for state in hidden]

    written = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    assert len(written) == 30
    for row, result in zip(rows, written, strict=True):
        scores = by_transformers(row, row["reference"])
        assert [result["chosen_score"], result["rejected_score"]] == pytest.approx(scores, abs=1e-5)
        shuffled = result["shuffled_reference"]
        other = int(shuffled["reference_from"].rpartition(":")[2]) - 1
        scores = by_transformers(row, rows[other]["reference"])
        assert [shuffled["chosen_score"], shuffled["rejected_score"]] == pytest.approx(scores, abs=1e-5)
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    margins = [result["margin"] for result in written]
    assert report["metrics"]["overall"]["accuracy"] == sum(margin > 0 for margin in margins) / 30
    assert (report["run"]["dtype"], report["run"]["device"]) == ("float32", "cpu")


def test_weights_of_nan_end_with_an_error(llama_reward, model_dir, write_rows, tmp_path, monkeypatch, capsys):
    with torch.no_grad():
        llama_reward.score.weight.fill_(torch.nan)
    llama_reward.save_pretrained(model_dir)
    data = write_rows([{"prompt": "?", "reference": "", "chosen": "a", "rejected": "b"}])
    assert run_tool(monkeypatch, model_dir, data, "--out", tmp_path / "out") == 1
    assert "not one of 1 pairs has finite scores" in " ".join(capsys.readouterr().err.split())


def test_a_device_that_is_not_there(llama_reward, model_dir, write_rows, monkeypatch, capsys):
    data = write_rows([{"prompt": "?", "reference": "", "chosen": "a", "rejected": "b"}])
    assert run_tool(monkeypatch, model_dir, data, "--device", "warp:9") == 1
    assert "error: device warp:9: " in capsys.readouterr().err
