"""What real frameworks are given are the rewards of `RewardScorer`, sample by sample."""

from __future__ import annotations

import json
import math
from statistics import mean, stdev

import pytest

from polar_ft.data.answers import Thinking
from polar_ft.rft.data import write_rl_data
from polar_ft.scoring.scorer import RewardScorer
from tests.frameworks.conftest import FLOOR


@pytest.fixture(scope="session")
def scored(model):
    """Gives the rewards of outputs, computed in this process."""
    scorer = RewardScorer.from_pretrained(model)

    def rewards(calls):
        answers = [Thinking().answer(call["output"]) for call in calls]
        asked = [
            {"prompt": call["prompt"], "reference": call["reference"], "output": answer}
            for call, answer in zip(calls, answers, strict=True)
            if answer is not None
        ]
        found = iter(scorer.score(asked))
        return [FLOOR if answer is None else next(found) for answer in answers]

    return rewards


def same_as(rewards):
    """To 1e-5, relative for rewards above 1: the server batches differently, and float32 has 7 digits."""
    return pytest.approx(rewards, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("trainer", "form"), [("GRPO", "sync"), ("RLOO", "async")])
def test_trl_trains(run, rows, model, server, scored, trainer, form):
    given = {"rows": rows, "model": str(model), "server": server, "floor": FLOOR}
    result = run("trl", "trl_run.py", **given, trainer=trainer, form=form)
    calls = result["calls"]
    assert len(calls) == 3 * 16
    for call in calls:
        call["output"] = call["output"][0]["content"]
    assert [call["reward"] for call in calls] == same_as(scored(calls))
    for step, log in enumerate(result["logs"]):
        mine = [call["reward"] for call in calls[16 * step : 16 * (step + 1)]]
        assert log["rewards/polar/mean"] == pytest.approx(sum(mine) / 16, rel=1e-5)
        assert math.isfinite(log["polar/unanswered"])


@pytest.mark.parametrize("version", ["0.5", "0.7", "0.9"])
def test_verl_gives_each_row_its_reward(run, rows, model, server, scored, version, tmp_path):
    data, parquet = tmp_path / "rows.jsonl", tmp_path / "rows.parquet"
    data.write_text("".join(json.dumps({**row, "prompt": row["question"]}) + "\n" for row in rows))
    write_rl_data(str(data), parquet, "verl")
    given = {"rows": rows, "parquet": str(parquet), "model": str(model), "server": server, "floor": FLOOR}
    result = run(f"verl-{version}", "verl_run.py", **given)
    calls = [{**row, "prompt": row["question"]} for row in rows]
    assert ".".join(map(str, result["version"])) == version
    assert result["rewards"] == same_as(scored(calls))
    assert result["extra"]["answered"] == [float(number != 5) for number in range(64)]
    assert set(result["extra"]) >= {"score", "raw", "answered", "truncated", "length"}
    if version == "0.9":
        assert result["managed"]["rewards"] == same_as(scored(calls))
        # 16 prompts, each with the outputs of four rows.
        grouped = [{**calls[i // 4 * 4], "output": row["output"]} for i, row in enumerate(rows)]
        rewards = scored(grouped)
        groups = [rewards[first : first + 4] for first in range(0, 64, 4)]
        expected = [(reward - mean(group)) / stdev(group) for group in groups for reward in group]
        assert result["managed"]["normalised"] == pytest.approx(expected, abs=1e-4)


def test_verifiers_scores_rollouts(run, rows, model, server, scored):
    result = run("verifiers", "verifiers_run.py", rows=rows, model=str(model), server=server, floor=FLOOR)
    expected = scored([{**row, "prompt": row["question"]} for row in rows])
    assert result["rewards"] == same_as(expected)
    assert result["totals"] == same_as([0.5 * reward for reward in expected])  # the weight of the reward
    assert "127.0.0.1:9" in result["away"]["error"]
    assert result["away"]["recorded"] is None


def test_trinity_scores_responses(run, rows, model, server, scored):
    result = run("trinity", "trinity_run.py", rows=rows, model=str(model), server=server, floor=FLOOR)
    # Trinity asks for one reward after the other, so each is compared with one that is computed alone.
    expected = [reward for row in rows for reward in scored([{**row, "prompt": row["question"]}])]
    assert result["rewards"] == same_as(expected)
    assert [metrics["polar"] for metrics in result["metrics"]] == same_as(expected)
    assert result["away"].startswith("RewardServerError: 127.0.0.1:9")


def test_areal_scores_episodes(run, rows, model, server, scored):
    result = run("areal", "areal_run.py", rows=rows, model=str(model), server=server, floor=FLOOR)
    calls = [{**row, "prompt": row["question"]} for row in rows]
    assert result["episodes"] == same_as(scored(calls))
    # AReaL's wrapper asks for one reward after the other.
    assert result["wrapped"] == same_as([reward for call in calls[:6] for reward in scored([call])])
    assert result["away"]["workflow"].startswith("RewardServerError: 127.0.0.1:9")
    assert result["away"]["wrapped"].startswith("PolarError: 127.0.0.1:9: no reward within 3.2 s")
