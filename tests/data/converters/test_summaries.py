"""From a published row to the benchmark's own summary: converters and evaluator use the same names."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polar_ft.data.converters import convert_file
from polar_ft.data.reading import read_examples
from polar_ft.evaluation.pairs import Ranking
from polar_ft.evaluation.statistics.benchmarks import Benchmarks, benchmarks
from tests.data.converters.published import published
from tests.data.rows import WriteRows

Summarise = Callable[[str, list[dict[str, Any]], dict[str, float]], Benchmarks]


@pytest.fixture
def summarise(write_rows: WriteRows, tmp_path: Path) -> Summarise:
    """Converts published rows and summarises them for a model that gives each text a given score."""

    def run(name: str, rows: list[dict[str, Any]], scores: dict[str, float]) -> Benchmarks:
        convert_file(name, str(write_rows("in.jsonl", rows)), tmp_path / "out.jsonl")
        rankings = [
            Ranking(
                id=example.id,
                subset=example.subset,
                prompt=number,
                model_scores=np.array([scores[text] for text in example.candidates]),
                given=np.array([float(info["score"]) for info in example.candidate_info]),
                info=list(example.candidate_info),
                benchmark=example.extra["benchmark"],
            )
            for number, example in enumerate(read_examples(tmp_path / "out.jsonl", pairing="all"))
        ]
        summary = benchmarks(rankings)
        assert summary is not None
        return summary

    return run


def test_rm_bench_for_a_model_that_looks_at_style_first(summarise: Summarise) -> None:
    # Style i of a correct answer gets i + 0.5, of a wrong one i: correct i is above wrong j where i >= j.
    row = published("rm-bench")
    scores = {text: i + 0.5 for i, text in enumerate(row["chosen"])}
    scores |= {text: float(i) for i, text in enumerate(row["rejected"])}
    summary = summarise("rm-bench", [row, row | {"id": "2", "domain": "code"}], scores).rm_bench
    assert summary is not None
    assert (summary.easy, summary.normal, summary.hard, summary.n_left_out) == (1, 1, 0, 0)
    assert summary.average == pytest.approx(6 / 9)
    assert list(summary.domains) == ["code", "math"]
    assert summary.missing_domains == ["chat", "safety"]


def test_rewardbench_2_with_its_ties(summarise: Summarise) -> None:
    ties = {"subset": "Ties", "models": None}
    rows = [
        published("rewardbench-2"),
        published("rewardbench-2", id="8", chosen=["right"], rejected=["wrong", "5", "22"]),
        published("rewardbench-2", id="ref:3", chosen=["4"], **ties),
        published("rewardbench-2", id="tied:3", chosen=["4", "four"], num_correct=2, **ties),
    ]
    scores = {"4": 1.0, "four": 1.25, "3": 0.0, "5": -1.0, "22": -1.0, "right": 0.0, "wrong": 3.0}
    summary = summarise("rewardbench-2", rows, scores).rewardbench_2
    assert summary is not None
    assert summary.ties is not None
    # All parts of Ties are right: the margin is 1 in both forms, the spread of the correct scores 0.25.
    score = 0.3 + 0.3 + 0.2 + 0.2 + 0.01 * math.tanh(1 / 0.25 - 1)
    assert summary.subsets == {"Math": 0.5, "Ties": pytest.approx(score)}
    assert (summary.ties.n_ref, summary.ties.n_tied, summary.n_left_out) == (1, 1, 0)
    assert summary.score == pytest.approx((0.5 + score) / 2)


def test_rmb_best_of_n(summarise: Summarise) -> None:
    rows = [
        published("rmb-bon"),
        published("rmb-bon", bon_uid="2", category_path="BoN_set/Helpfulness/Chat/Discussion"),
        published("rmb-bon", bon_uid="3", loser_list=[{"llm_name": "m", "answer": "better"}]),
    ]
    summary = summarise("rmb-bon", rows, {"4": 1.0, "5": 0.0, "22": -1.0, "better": 2.0}).rmb
    assert summary is not None
    assert {goal: figures.accuracy for goal, figures in summary.goals.items()} == {
        "Harmlessness": 0.5,
        "Helpfulness": 1.0,
    }
    assert (summary.accuracy, summary.n_left_out) == (pytest.approx(2 / 3), 0)
