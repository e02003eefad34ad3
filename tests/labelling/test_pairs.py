"""What is read of rows, and in which order pairs are shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from polar_ft.data.reading import DataSource
from polar_ft.data.records import RowError
from polar_ft.errors import PolarError
from polar_ft.labelling.pairs import ordered_pairs, parse_task, read_tasks
from polar_ft.template import EncodeError
from tests.labelling.conftest import pairs_of

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    "answers",
    [
        {"chosen": "b", "rejected": "a"},
        {"candidates": ["a", "b", "a"]},
        {
            "responses": [
                {"content": "b", "score": 1.0},
                {"messages": [{"role": "assistant", "content": "a"}]},
            ]
        },
        {"responses": ["b", "a"]},
    ],
    ids=lambda answers: "-".join(answers),
)
def test_all_forms_give_the_same_pair(answers):
    (pair,) = pairs_of([{"prompt": TURNS, **answers}])
    assert [answer.text for answer in pair.answers] == ["a", "b"]
    assert pair.prompt == TURNS
    assert pair.key == pairs_of([{"prompt": "Hi\nHello", "candidates": ["a", "b"]}])[0].key


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"candidates": ["a", "b"]}, "prompt: is missing"),
        ({"prompt": "p", "candidates": ["a", "a"]}, "has 1 different answers, and a comparison needs two"),
        ({"prompt": "p", "candidates": "ab"}, "candidates: must be a list"),
        ({"prompt": "p", "candidates": ["a", 7]}, r"candidates\[1\]: must be a string or a list of messages"),
        ({"prompt": "p", "chosen": "a"}, "has no answers"),
    ],
)
def test_a_row_that_cannot_be_labelled_says_why(row, message):
    with pytest.raises(RowError, match=message):
        parse_task(row, "in.jsonl:1")


def test_rows_that_cannot_be_labelled_are_named_and_the_others_read(tmp_path: Path):
    file = tmp_path / "in.jsonl"
    rows = ['{"prompt": "p", "candidates": ["a", "b"]}', '{"prompt": "p"}', "{", '{"prompt": 7}']
    file.write_text("\n".join(rows))
    tasks, problems = read_tasks(DataSource(path=str(file)))
    assert len(tasks) == 1
    assert [problem.line for problem in problems] == [2, 3, 4]


def test_a_table_is_read_like_other_data(tmp_path: Path):
    file = tmp_path / "in.csv"
    file.write_text("prompt,chosen,rejected\n2 + 2?,4,5\n")
    (task,), problems = read_tasks(DataSource(path=str(file)))
    assert ([answer.text for answer in task.answers], problems) == (["4", "5"], [])


def test_a_pair_that_comes_twice_is_shown_once():
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "candidates": ["b", "a"]}]
    assert len(pairs_of(rows)) == 1


def test_several_pairs_of_a_row():
    task = parse_task({"prompt": "p", "candidates": ["a", "b", "c", "d"]}, "in.jsonl:1")
    assert len(ordered_pairs([task])) == 1
    pairs = ordered_pairs([task], most=6)
    assert len({pair.key for pair in pairs}) == 6
    assert ordered_pairs([task], most=2) == pairs[:2]


def test_the_model_comes_to_the_same_order_as_by_hand():
    """Rewards 1, 4, 2.5 for the answers of the first row, margins 3, 1.5, 1.5; 0 and 0.5 for the second."""
    rewards = {"a": 1.0, "b": 4.0, "c": 2.5, "d": 0.0, "e": 0.5}
    tasks = [
        parse_task({"prompt": "p", "candidates": ["a", "b", "c"]}, "in.jsonl:1"),
        parse_task({"prompt": "q", "candidates": ["d", "e"]}, "in.jsonl:2"),
    ]
    done: list[int] = []
    pairs = ordered_pairs(
        tasks,
        most=3,
        score=lambda groups: [[rewards[text] for text in group.candidates] for group in groups],
        on_scored=done.append,
    )
    texts = ["".join(answer.text for answer in pair.answers) for pair in pairs]
    assert (texts[0], sorted(texts[1:3]), texts[3]) == ("de", ["ac", "bc"], "ab")
    assert pairs[0].margin == -0.5
    assert sum(done) == 2


def test_a_row_that_the_model_cannot_read_is_named():
    def score(groups):
        raise EncodeError(1, "too long")

    tasks = [parse_task({"prompt": "p", "candidates": ["a", "b"]}, f"in.jsonl:{line}") for line in (1, 2)]
    with pytest.raises(PolarError, match=r"row in.jsonl:2: .*too long"):
        ordered_pairs(tasks, score=score)


def test_keys_do_not_depend_on_how_texts_are_joined():
    first, second = pairs_of(
        [
            {"prompt": "p", "reference": "q", "candidates": ["a", "b"]},
            {"prompt": 'p", "q', "reference": "", "candidates": ["a", "b"]},
        ]
    )
    assert first.key != second.key


@pytest.mark.parametrize(
    ("field", "value"), [("weight", "two"), ("references", "one"), ("references", ["r", 3]), ("subset", 3)]
)
def test_a_row_whose_decision_could_not_be_read_again_is_named(field, value):
    row = {"prompt": "Q", "candidates": ["a", "b"], field: value}
    with pytest.raises(RowError, match=field):
        parse_task(row, "in.jsonl:1")
