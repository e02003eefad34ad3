"""RMB: which answer becomes the reference, which pairs are left, and the POLAR paper's protocol."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_ft.data.converters import convert_file
from polar_ft.data.converters.rmb import (
    HOLDS_REFERENCE,
    NO_THIRD,
    TWO_SCORES,
    UNDECIDED,
    rmb,
    rmb_bon,
    rmb_polar,
)
from polar_ft.data.reading import read_rows
from polar_ft.errors import PolarError
from tests.data.converters.published import published, rmb_pairs
from tests.data.rows import WriteRows

SCORES = {"a": 5.0, "b": 4.5, "c": 4.0, "d": 1.5}
PAIRS = [("b", "d"), ("a", "c"), ("b", "c"), ("a", "d"), ("c", "d")]


def text(field: Any) -> str:
    return field if isinstance(field, str) else field[0]["content"]


def test_the_best_answer_becomes_the_reference_of_the_pairs_without_it() -> None:
    done = rmb(rmb_pairs(PAIRS, SCORES))
    assert done.left_out == {HOLDS_REFERENCE: 2}  # a over c, a over d
    assert [(text(row["chosen"]), text(row["rejected"])) for row in done.rows] == [
        ("b", "d"),
        ("b", "c"),
        ("c", "d"),
    ]
    assert {text(row["reference"]) for row in done.rows} == {"a"}
    assert done.rows[0] == {
        "id": "2 + 2?-0",
        "subset": "Helpfulness/Reasoning",
        "scenario": "Human Decision Making",
        "benchmark": "rmb",
        "prompt": [{"role": "user", "content": "2 + 2?"}],
        "reference": [{"role": "assistant", "content": "a"}],
        "chosen": [{"role": "assistant", "content": "b"}],
        "rejected": [{"role": "assistant", "content": "d"}],
        "reference_score": 5.0,
        "reference_policy": "model-a",
        "chosen_score": 4.5,
        "chosen_policy": "model-b",
        "rejected_score": 1.5,
        "rejected_policy": "model-d",
    }


def test_without_a_reference_all_published_pairs_are_kept() -> None:
    done = rmb(rmb_pairs(PAIRS, SCORES), reference="none")
    assert [(text(row["chosen"]), text(row["rejected"])) for row in done.rows] == PAIRS
    assert {row["reference"] for row in done.rows} == {""}
    assert done.left_out == {}


def test_of_equally_good_answers_the_first_in_the_file_is_the_reference() -> None:
    done = rmb(rmb_pairs([("b", "c"), ("a", "c")], SCORES | {"b": 5.0}))
    assert [(text(row["reference"]), text(row["chosen"])) for row in done.rows] == [("b", "a")]


def test_polar_protocol_by_hand() -> None:
    (row,) = rmb_polar(rmb_pairs(PAIRS, SCORES)).rows
    assert [text(row[key]) for key in ("reference", "chosen", "rejected")] == ["a", "b", "c"]
    assert row["id"] == "2 + 2?-0"
    # The second and the third answer are tied: nothing to be asked.
    assert rmb_polar(rmb_pairs(PAIRS, SCORES | {"c": 4.5})).rows == []
    # The best two are tied: the first of them in the file is the reference.
    (row,) = rmb_polar(rmb_pairs(PAIRS, SCORES | {"b": 5.0})).rows
    assert [text(row[key]) for key in ("reference", "chosen", "rejected")] == ["b", "a", "c"]
    assert rmb_polar(rmb_pairs([("a", "b")], SCORES)).left_out == {NO_THIRD: 1}


def test_an_answer_with_two_scores_loses_only_its_own_pairs() -> None:
    rows = rmb_pairs(PAIRS, SCORES)
    rows[3]["reject"]["score"] = 2.0  # d, which is 1.5 in two other pairs
    done = rmb(rows)
    assert [(text(row["chosen"]), text(row["rejected"])) for row in done.rows] == [("b", "c")]
    assert done.left_out == {TWO_SCORES: 3, HOLDS_REFERENCE: 1}
    assert len(rmb(rows, reference="none").rows) == len(PAIRS)
    # It is the worst answer with either score: the first three are known.
    assert [text(row["chosen"]) for row in rmb_polar(rows).rows] == ["b"]
    rows[3]["reject"]["score"] = 4.0  # as good as the third
    assert rmb_polar(rows).left_out == {TWO_SCORES: 1}


def without_scores(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as the repository has them since its commit 165a8f3."""
    for row in rows:
        del row["chosen"]["score"], row["reject"]["score"]
    return rows


def test_without_scores_the_pairs_are_kept_or_decide_the_order() -> None:
    rows = without_scores(rmb_pairs(PAIRS, SCORES))
    (row, *others) = rmb(rows, reference="none").rows
    assert (len(others), row["reference"], row["chosen_policy"]) == (len(PAIRS) - 1, "", "model-b")
    assert not {key for key in row if key.endswith("score")}
    # Nothing says which of a and b is better; b over a decides the first three, b, a, c.
    assert rmb(rows, reference="pairs").left_out == {UNDECIDED: len(PAIRS)}
    assert rmb_polar(rows, reference="pairs").left_out == {UNDECIDED: 1}
    rows += without_scores(rmb_pairs([("b", "a")], SCORES))
    done = rmb(rows, reference="pairs")
    assert [(text(row["reference"]), text(row["chosen"]), text(row["rejected"])) for row in done.rows] == [
        ("b", "a", "c"),
        ("b", "a", "d"),
        ("b", "c", "d"),
    ]
    assert done.left_out == {HOLDS_REFERENCE: 3}
    (row,) = rmb_polar(rows, reference="pairs").rows
    assert [text(row[key]) for key in ("reference", "chosen", "rejected")] == ["b", "a", "c"]
    # Pairs that contradict each other decide nothing.
    rows += without_scores(rmb_pairs([("c", "b")], SCORES))
    assert rmb(rows, reference="pairs").left_out == {UNDECIDED: 7}


def test_a_text_that_is_chosen_over_itself_decides_nothing() -> None:
    rows = without_scores(rmb_pairs([("a", "a"), ("a", "b")], SCORES))
    assert rmb(rows, reference="pairs").left_out == {HOLDS_REFERENCE: 2}


def test_where_scores_are_needed_the_message_says_which_commit_has_them(
    write_rows: WriteRows, tmp_path: Path
) -> None:
    source = str(write_rows("in.jsonl", without_scores(rmb_pairs(PAIRS, SCORES))))
    for name in ("rmb", "rmb-polar"):
        with pytest.raises(PolarError, match=r"5 cannot be used.*git checkout 94c5976 .*--reference pairs"):
            convert_file(name, source, tmp_path / "out.jsonl")
    with pytest.raises(PolarError, match="--reference none: the format rmb-polar has best, pairs"):
        convert_file("rmb-polar", source, tmp_path / "out.jsonl", options={"reference": "none"})
    done = convert_file("rmb", source, tmp_path / "out.jsonl", options={"reference": "none"})
    assert (done.rows_in, done.prompts_in, done.pairs, done.unusable) == (5, 1, 5, 0)


def test_rows_prompts_and_pairs_are_counted(write_rows: WriteRows, tmp_path: Path) -> None:
    rows = rmb_pairs(PAIRS, SCORES, "One?") + without_scores(rmb_pairs(PAIRS[:2], SCORES, "Two?"))
    done = convert_file("rmb", str(write_rows("in.jsonl", rows)), tmp_path / "out.jsonl")
    assert (done.rows_in, done.prompts_in, done.pairs) == (7, 2, 3)
    assert (len(done.problems), done.unusable) == (1, 2)


def test_a_text_of_two_models_counts_once_with_the_higher_score() -> None:
    rows = rmb_pairs([("a", "d"), ("b", "d"), ("c", "d")], SCORES)
    rows[2]["chosen"] = {"llm_name": "another", "answer": "a", "score": 3.0}
    (row,) = rmb_polar(rows).rows
    assert [text(row[key]) for key in ("reference", "chosen", "rejected")] == ["a", "b", "d"]
    # No pair is left that asks for the text of the reference.
    assert [row["id"] for row in rmb(rows).rows] == ["2 + 2?-1"]


def test_best_of_n_by_hand() -> None:
    (row,) = rmb_bon(published("rmb-bon")).rows
    assert row["responses"] == [
        {"content": "4", "score": 1, "correct": True, "policy": "model-4"},
        {"content": "5", "score": 0, "correct": False, "policy": "model-5"},
        {"content": "22", "score": 0, "correct": False, "policy": "model-22"},
    ]
    assert {key: row[key] for key in ("id", "subset", "benchmark", "reference")} == {
        "id": "1291",
        "subset": "Harmlessness/S1",
        "benchmark": "rmb",
        "reference": "",
    }


@given(
    scores=st.lists(st.integers(2, 10), min_size=2, max_size=9, unique=True),
    order=st.randoms(use_true_random=False),
)
def test_published_pairs_are_kept_or_hold_the_reference(scores: list[int], order: random.Random) -> None:
    names = {f"answer {score}": score / 2 for score in scores}
    pairs = [(a, b) for a in names for b in names if names[a] > names[b] and order.random() < 0.7]
    if not pairs:
        return
    rows = rmb_pairs(pairs, names)
    done = rmb(rows)
    best = max({name for pair in pairs for name in pair}, key=names.__getitem__)
    assert {text(row["reference"]) for row in done.rows} <= {best}
    assert {(text(row["chosen"]), text(row["rejected"])) for row in done.rows} == {
        pair for pair in pairs if best not in pair
    }
    assert len(done.rows) + done.left_out.get(HOLDS_REFERENCE, 0) == len(pairs)
    # With scores that differ, the order of the file is of no effect.
    shuffled = order.sample(rows, len(rows))
    assert {row["id"] for row in rmb(shuffled).rows} == {row["id"] for row in done.rows}
    texts = [[text(row[k]) for k in ("reference", "chosen", "rejected")] for row in rmb_polar(shuffled).rows]
    ranked = sorted({name for pair in pairs for name in pair}, key=lambda name: -names[name])
    assert texts == ([ranked[:3]] if len(ranked) > 2 else [])


def test_the_folder_as_it_lies_in_the_repository(tmp_path: Path) -> None:
    # Lists with an indent of one, in folders of folders; the pairs of one prompt need not stand together.
    folder = tmp_path / "Pairwise_set"
    first, second = rmb_pairs(PAIRS, SCORES, "One?"), rmb_pairs(PAIRS[:2], SCORES, "Two?")
    for name, rows in {
        "Harmlessness/S1.json": [first[0], *second],
        "Helpfulness/Reasoning/Human Decision Making.json": first[1:],
        ".git/other.json": second,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    done = convert_file("rmb", str(folder), tmp_path / "out.jsonl")
    assert (done.rows_in, done.pairs, dict(done.left_out), done.without_pairs) == (
        7,
        4,
        {HOLDS_REFERENCE: 3},
        0,
    )
    written = [row for _, row in read_rows(tmp_path / "out.jsonl")]
    assert [row["id"] for row in written] == ["One?-0", "One?-2", "One?-4", "Two?-0"]  # type: ignore[index]
    assert convert_file("rmb-polar", str(folder), tmp_path / "polar.jsonl").pairs == 2


def test_a_bad_row_of_a_prompt_does_not_take_the_others_away(write_rows: WriteRows, tmp_path: Path) -> None:
    rows = rmb_pairs(PAIRS, SCORES)
    rows[1]["chosen"] = None
    done = convert_file("rmb", str(write_rows("in.jsonl", rows)), tmp_path / "out.jsonl")
    assert [(problem.line, problem.field) for problem in done.problems] == [(2, "chosen")]
    assert done.pairs == 3


def test_where_no_pair_is_left_the_error_says_so(write_rows: WriteRows, tmp_path: Path) -> None:
    source = write_rows("in.jsonl", rmb_pairs([("a", "b")], SCORES))
    with pytest.raises(
        PolarError, match=r"none of its 1 rows gives a pair as rmb \(of 1 prompt no pair was left\)$"
    ):
        convert_file("rmb", str(source), tmp_path / "out.jsonl")
