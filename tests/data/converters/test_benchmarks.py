"""RewardBench, RewardBench 2, RM-Bench and JudgeBench: rows worked by hand, and properties."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_ft.data.converters.benchmarks import judgebench, rewardbench, rewardbench_2, rm_bench
from polar_ft.data.records import RowError, parse_row
from tests.data.converters.published import published


def test_rewardbench_by_hand() -> None:
    assert rewardbench(published("rewardbench")).rows == [
        {
            "id": 3,
            "subset": "math-prm",
            "benchmark": "rewardbench",
            "section": "Reasoning",
            "prompt": "2 + 2?",
            "reference": "",
            "chosen": "4",
            "rejected": "5",
            "chosen_policy": "human",
            "rejected_policy": "gpt4",
        }
    ]
    assert "section" not in rewardbench(published("rewardbench", subset="new")).rows[0]


def test_rewardbench_2_by_hand() -> None:
    assert rewardbench_2(published("rewardbench-2")).rows == [
        {
            "id": "7",
            "subset": "Math",
            "benchmark": "rewardbench-2",
            "prompt": "2 + 2?",
            "reference": "",
            "responses": [
                {"content": "4", "score": 1, "correct": True, "policy": "a"},
                {"content": "3", "score": 0, "correct": False, "policy": "b"},
                {"content": "5", "score": 0, "correct": False, "policy": "c"},
                {"content": "22", "score": 0, "correct": False, "policy": "d"},
            ],
            "additional_metadata": {"category": "arithmetic", "valid": 1.0},
        }
    ]


def ties(**changes: Any) -> dict[str, Any]:
    row = published("rewardbench-2", id="tied:4", subset="Ties", chosen=["4", "four"], rejected=["5"])
    return row | {"num_correct": 2, "num_incorrect": 1, "models": ["one"]} | changes


def test_ties_of_rewardbench_2_have_several_correct_answers() -> None:
    (row,) = rewardbench_2(ties()).rows
    assert row["id"] == "tied:4"  # the benchmark's score of Ties pairs this row with "ref:4"
    # Only one model is named for three answers: whose it is is not known.
    assert [(r["content"], r["correct"], "policy" in r) for r in row["responses"]] == [
        ("4", True, False),
        ("four", True, False),
        ("5", False, False),
    ]


def test_a_correct_answer_as_reference() -> None:
    (row,) = rewardbench_2(ties(), reference="best").rows
    assert (row["reference"], [r["content"] for r in row["responses"]]) == ("4", ["four", "5"])
    with pytest.raises(RowError, match="has one answer — a reference and a pair need two"):
        rewardbench_2(published("rewardbench-2"), reference="best")
    (row,) = rm_bench(published("rm-bench"), reference="best").rows
    assert row["reference"] == "4"
    assert [(r["style"], r["correct"]) for r in row["responses"]] == [
        ("detailed_plain", True),
        ("detailed_markdown", True),
        ("concise", False),
        ("detailed_plain", False),
        ("detailed_markdown", False),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_correct": 3}, "num_correct: is 3, but there are 2"),
        ({"num_incorrect": 4}, "num_incorrect: is 4, but there are 1"),
    ],
)
def test_counts_that_do_not_fit_are_an_error(changes: dict[str, int], message: str) -> None:
    with pytest.raises(RowError, match=message):
        rewardbench_2(ties(**changes))


def test_judgebench_by_hand() -> None:
    (row,) = judgebench(published("judgebench")).rows
    assert row == {
        "id": "81ec57f2",
        "subset": "mmlu-pro-computer science",
        "benchmark": "judgebench",
        "category": "Knowledge",
        "prompt": "2 + 2?",
        "reference": "",
        "chosen": "4",
        "rejected": "5",
        "chosen_policy": "gpt-4o-2024-05-13",
        "rejected_policy": "gpt-4o-2024-05-13",
        "original_id": "10646",
    }
    (row,) = judgebench(published("judgebench", label="A>B", original_id=1420)).rows
    assert (row["chosen"], row["rejected"], row["original_id"]) == ("5", "4", 1420)


@given(
    correct=st.lists(st.text("ab"), min_size=1, max_size=6),
    wrong=st.lists(st.text("cd"), min_size=1, max_size=6),
    reference=st.sampled_from(["best", "none"]),
)
def test_every_pair_has_a_correct_answer_over_a_wrong_one(
    correct: list[str], wrong: list[str], reference: Any
) -> None:
    row = published("rewardbench-2", chosen=correct, rejected=wrong, num_correct=None, num_incorrect=None)
    if reference == "best" and len(correct) == 1:
        with pytest.raises(RowError):
            rewardbench_2(row, reference="best")
        return
    example = parse_row(rewardbench_2(row, reference=reference).rows[0]).to_example("x:1", pairing="all")
    left = correct[1:] if reference == "best" else correct
    pairs = sorted((example.candidates[a], example.candidates[b]) for a, b in example.pairs)
    assert pairs == sorted((a, b) for a in left for b in wrong)
    assert example.reference == (correct[0] if reference == "best" else "")
    assert {info["correct"] for info in example.candidate_info} == {True, False}
