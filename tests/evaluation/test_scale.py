"""`polar-ft calibrate`: figures derived by hand, and the command on a real model."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from polar_ft.cli import app
from polar_ft.errors import DataError, PolarError
from polar_ft.evaluation.scale import measure_scale, read_groups
from polar_ft.reward_scale import FILE_NAME, RewardScale

torch = pytest.importorskip("torch")


def test_each_reference_counts_the_same():
    # Means 2 and 10 of three rewards and one: centre 6 (all four alike would give 4).
    # Squared distances from it: (25 + 16 + 9) / 3 = 16.667 and 16; their mean is 16.333.
    scale = measure_scale([[1.0, 2.0, 3.0], [10.0]], [[], []])
    assert scale.centre == 6.0
    assert scale.spread == pytest.approx(math.sqrt((50 / 3 + 16) / 2))
    assert scale.within_spread == pytest.approx(1.0)  # sample variance of 1, 2, 3
    assert (scale.n_rewards, scale.n_references, scale.n_pairs, scale.temperature) == (4, 2, 0, None)
    # Weights 1/6, 1/6, 1/6 and 1/2: half the weight is reached at 3.
    assert scale.quantiles["p25"] == 2.0
    assert scale.quantiles["p50"] == 3.0
    assert scale.quantiles["p75"] == 10.0


def test_temperature_makes_the_stated_share_right():
    # Four of five pairs of margin 2 are right: σ(2 / T) = 4/5, so T = 2 / log 4.
    rewards = [[2.0, 0.0]] * 5
    scale = measure_scale(rewards, [[(0, 1)]] * 4 + [[(1, 0)]])
    assert scale.temperature == pytest.approx(2 / math.log(4), rel=1e-6)
    assert scale.preference(2.0, 0.0) == pytest.approx(0.8, rel=1e-6)
    assert scale.n_pairs == 5


def test_no_spread_within_single_candidates():
    assert measure_scale([[1.0], [2.0]], [[], []]).within_spread is None


@given(
    st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=5), min_size=2, max_size=8),
    st.floats(-50, 50),
    st.floats(0.1, 10),
)
def test_moves_and_stretches_with_the_rewards(rewards, shift, factor):
    if np.ptp(np.concatenate(rewards)) < 1e-3:
        return
    pairs = [[] for _ in rewards]
    scale = measure_scale(rewards, pairs)
    other = measure_scale([[factor * reward + shift for reward in group] for group in rewards], pairs)
    assert other.centre == pytest.approx(factor * scale.centre + shift, abs=1e-6)
    assert other.spread == pytest.approx(factor * scale.spread, rel=1e-6)
    scaled = [scale.apply(group) for group in rewards]
    assert np.mean([np.mean(group) for group in scaled]) == pytest.approx(0, abs=1e-6)
    assert np.mean([np.mean(np.square(group)) for group in scaled]) == pytest.approx(1, rel=1e-6)


def test_nothing_to_measure_is_an_error():
    with pytest.raises(PolarError, match="all rewards are the same"):
        measure_scale([[1.0, 1.0]], [[]])
    with pytest.raises(PolarError, match="1 of 3 rewards are not finite"):
        measure_scale([[1.0, math.nan], [2.0]], [[], []])


def test_rows_of_one_reference_come_together(write_rows):
    pair = {"prompt": "p", "reference": "r"}
    data = write_rows(
        [
            {**pair, "chosen": "a", "rejected": "b"},
            {**pair, "output": "c"},
            {**pair, "reference": "other", "output": "d"},
            {**pair, "chosen": "e", "rejected": "a"},
            {**pair, "output": [{"role": "assistant", "content": "f"}], "wrapper": "pretrain"},
        ]
    )
    groups = read_groups([str(data)])
    assert [(g.reference, g.wrapper, g.candidates, g.pairs) for g in groups] == [
        ("r", "sft", ("a", "b", "c", "e", "a"), ((0, 1), (3, 4))),
        ("other", "sft", ("d",), ()),
        ("r", "pretrain", ("f",), ()),
    ]


def test_a_bad_row_is_named(write_rows):
    data = write_rows([{"prompt": "p", "reference": "r", "output": "x"}, {"prompt": "p", "output": 3}])
    with pytest.raises(DataError, match=r"held_out\.jsonl:2: reference"):
        read_groups([str(data)])


@pytest.fixture
def reward_model(model_dir):
    """A random Llama with a reward head, in the tokenizer's folder."""
    import transformers

    from polar_ft.template import PolarTemplate

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(PolarTemplate.from_pretrained(model_dir)),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=1,
        initializer_range=0.3,
    )
    transformers.LlamaForSequenceClassification(config).save_pretrained(model_dir)
    return model_dir


def test_the_command_and_the_scorer_that_applies_it(reward_model, write_rows):
    from polar_ft.scoring.scorer import RewardScorer

    rows = [
        {"prompt": f"Question {i}", "reference": "yes", "chosen": f"answer {i}", "rejected": f"{i} no"}
        for i in range(20)
    ]
    result = CliRunner().invoke(app, ["calibrate", str(reward_model), str(write_rows(rows))])
    assert result.exit_code == 0, result.output
    assert "40 rewards of 20 (prompt, reference), 20 pairs" in result.output
    scale = RewardScale.load(reward_model)
    assert scale.dtype == "float32"
    assert list(map(len, scale.data.values())) == [64]

    scorer = RewardScorer.from_pretrained(reward_model)
    data = [
        {"prompt": row["prompt"], "reference": row["reference"], "output": row[side]}
        for row in rows
        for side in ("chosen", "rejected")
    ]
    raw = scorer.score(data)
    assert scale.centre == pytest.approx(np.mean(raw), rel=1e-6)
    assert scale.spread == pytest.approx(np.std(raw), rel=1e-6)
    assert scorer.score(data, scale=True) == pytest.approx((np.array(raw) - scale.centre) / scale.spread)


def test_a_sample_of_the_references(reward_model, write_rows, tmp_path):
    rows = [{"prompt": f"{i}", "reference": "", "output": f"answer {i}"} for i in range(30)]
    out = tmp_path / "scale.json"
    command = ["calibrate", str(reward_model), str(write_rows(rows)), "--out", str(out)]
    result = CliRunner().invoke(app, [*command, "--max-references", "7"])
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text())["n_references"] == 7
    assert not (reward_model / FILE_NAME).exists()


def test_a_hub_id_has_no_folder_to_keep_it_in(write_rows):
    result = CliRunner().invoke(app, ["calibrate", "internlm/POLAR-7B", str(write_rows([{}]))])
    assert isinstance(result.exception, PolarError)
    assert "--out" in str(result.exception)
