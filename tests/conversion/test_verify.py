"""``--verify``: what differs is told and nothing kept; what does not is confirmed."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from polar_ft.conversion.verify import compare_rewards, sample
from polar_ft.errors import PolarError
from polar_ft.model import backbones
from polar_ft.model.internlm2 import fuse_wqkv


@pytest.fixture
def rows(tmp_path):
    """Forty rows; the first two have three candidates."""
    file = tmp_path / "rows.jsonl"
    pair = {"prompt": "Which city is it?", "reference": "Beijing."}
    ranked = [
        {"content": text, "score": score}
        for text, score in (("It is Beijing.", 3), ("Shanghai.", 2), ("no", 1))
    ]
    lines = [
        {**pair, "responses": ranked}
        if number < 2
        else {**pair, "chosen": "Beijing " * number, "rejected": "No!"}
        for number in range(40)
    ]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return file


def scorer(*rewards):
    return lambda: SimpleNamespace(score_examples=lambda examples: [list(row) for row in rewards])


def examples(*pairs):
    return [
        SimpleNamespace(source=f"rows.jsonl:{line}", candidates=("a", "b"), pairs=((0, 1),))
        for line, _ in enumerate(pairs, start=1)
    ]


def test_by_hand():
    """Range 3 − (−1) = 4; differences 0, 0.25, 0.125, 0; the second pair turns: 0 < 0.1, 0.125 > 0.1."""
    before, after = ((3, -1), (0, 0.1)), ((3, -1.25), (0.125, 0.1))
    outcome = compare_rewards(
        examples(1, 2), trained=scorer(*before), exported=scorer(*after), tolerance=0.25 / 4
    )
    assert (outcome.rows, outcome.difference, outcome.spread) == (2, 0.25, 4)
    assert (outcome.pairs, outcome.turned) == (2, 1)
    assert "0.25, their range 4; 1 of 2 pairs" in str(outcome)
    with pytest.raises(PolarError, match=r"rows.jsonl:1 has a reward of -1.0000 .* and -1.2500 .* 0.06 of"):
        compare_rewards(examples(1, 2), trained=scorer(*before), exported=scorer(*after), tolerance=0.06)


def test_nan_is_a_difference():
    with pytest.raises(PolarError, match=r"rows.jsonl:2 has a reward of 2.0000 .* nan"):
        compare_rewards(
            examples(1, 2),
            trained=scorer((0, 1), (2, 3)),
            exported=scorer((0, 1), (float("nan"), 3)),
            tolerance=1.0,
        )


def test_rewards_that_are_all_the_same_prove_nothing():
    same = scorer((0, 0), (0, 0))
    with pytest.raises(PolarError, match="every candidate the reward 0, so there is nothing to compare"):
        compare_rewards(examples(1, 2), trained=same, exported=same, tolerance=1)


def test_the_sample_is_the_first_rows(rows):
    found = sample(rows)
    assert len(found) == 32
    assert [len(example.candidates) for example in found[:3]] == [3, 3, 2]
    assert found[31].source == f"{rows}:32"


def test_a_conversion_is_verified(config_file, checkpoint, rows, tmp_path, run_tool):
    status, said, _ = run_tool(config_file, checkpoint, tmp_path / "out", "--verify", rows)
    assert status == 0
    assert "verified: in 32 rows the largest difference of the rewards is" in said
    assert "; 0 of " in said


def test_rounding_is_measured(config_file, checkpoint, rows, tmp_path, run_tool):
    """In bfloat16 rewards differ: within what is expected, and by more than 1e-6 of the range."""
    arguments = (config_file, checkpoint, tmp_path / "out", "--dtype", "bfloat16", "--verify", rows)
    assert run_tool(*arguments)[0] == 0
    (tmp_path / "out").rename(tmp_path / "first")
    status, said, error = run_tool(*arguments, "--verify-tolerance", "1e-6")
    assert (status, said) == (1, "")
    assert "more than 1e-06 of the range, so nothing was kept. Try --dtype float32" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("run", ["zero3", "xtuner_zero2"])
def test_runs_with_deepspeed(base, config_file, train, rows, tmp_path, run_tool, run):
    status, said, error = run_tool(config_file, train(run), tmp_path / "out", "--verify", rows)
    assert status == 0, error
    assert "verified: in 32 rows" in said


def test_a_wrong_export_is_found(config_file, checkpoint, rows, tmp_path, run_tool, monkeypatch):
    """Keys and values exchanged: every shape is right, and only the rewards tell."""
    monkeypatch.setattr(backbones.internlm2, "fuse_wqkv", lambda q, k, v, *heads: fuse_wqkv(q, v, k, *heads))
    before = sorted(tmp_path.iterdir())
    assert run_tool(config_file, checkpoint, tmp_path / "wrong")[0] == 0
    status, said, error = run_tool(config_file, checkpoint, tmp_path / "out", "--verify", rows)
    assert (status, said) == (1, "")
    assert "error: --verify: in 32 rows the largest difference of the rewards is" in error
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "wrong"])


def test_adapters(config_file, lora_checkpoint, rows, tmp_path, run_tool):
    """Merged into the base, and beside it."""
    for option in ((), ("--adapter-only",)):
        out = tmp_path / f"out{len(option)}"
        status, said, error = run_tool(config_file, lora_checkpoint, out, "--verify", rows, *option)
        assert status == 0, error
        assert "verified: in 32 rows" in said


def test_rows_are_read_first(config_file, checkpoint, tmp_path, run_tool):
    """Before anything that takes long; the checkpoint is not looked at."""
    checkpoint.unlink()
    arguments = (config_file, checkpoint, tmp_path / "out", "--verify", tmp_path / "rws.jsonl")
    assert "rws.jsonl: no such file" in run_tool(*arguments)[2]
