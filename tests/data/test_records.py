"""Rows: which are valid, the errors of those that are not, and the Example of a row."""

from __future__ import annotations

from typing import Any

import pytest

from polar_ft.data.records import PairRow, RankedRow, RowError, batches, parse_row
from tests.data.rows import pair, ranked

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_pair_row_becomes_an_example_of_one_pair() -> None:
    row = pair(id=3, subset="maths", margin=0.5, weight=2.0, wrapper="pretrain", source_model="m")
    example = parse_row(row).to_example("f.jsonl:9", weight=0.5)
    assert (example.prompt, example.reference, example.candidates) == ("2 + 2?", "4", ("four", "five"))
    assert (example.pairs, example.margins, example.weights) == (((0, 1),), (0.5,), (1.0,))
    assert (example.wrapper, example.id, example.subset) == ("pretrain", "3", "maths")
    assert example.extra == {"source_model": "m"}
    assert example.source == "f.jsonl:9"


def test_messages_are_joined_with_line_ends_and_keep_extra_fields() -> None:
    row = parse_row(pair(prompt=[*MESSAGES, {"role": "tool", "content": "x", "name": "t"}]))
    assert isinstance(row, PairRow)
    assert row.to_example("f:1").prompt == "Hi\nHello\nx"
    assert row.prompt[2].model_extra == {"name": "t"}  # type: ignore[union-attr]


def test_reference_may_be_empty_in_both_forms() -> None:
    assert parse_row(pair(reference="")).to_example("f:1").reference == ""
    assert parse_row(pair(reference=[])).to_example("f:1").reference == ""


def test_several_references_in_both_forms() -> None:
    several = {"references": ["4", MESSAGES]}
    row = {key: value for key, value in pair().items() if key != "reference"}
    example = parse_row({**row, **several}).to_example("f:1")
    assert example.references == ("4", "Hi\nHello")
    # A ranked row with references of its own takes none of its responses for one; two are enough.
    responses = [{"content": "a", "score": 2}, {"content": "b", "score": 1}]
    example = parse_row({"prompt": "?", "responses": responses, **several}).to_example("f:1")
    assert example.references == ("4", "Hi\nHello")
    assert (example.candidates, example.pairs) == (("a", "b"), ((0, 1),))
    # Parquet has the column in every row.
    assert parse_row({**pair(), "references": None}).to_example("f:1").references == ("4",)
    assert parse_row({**row, "reference": None, "references": ["4"]}).to_example("f:1").reference == "4"


@pytest.mark.parametrize(
    ("fields", "field", "reason"),
    [
        (
            {"reference": "4", "references": ["4"]},
            "references",
            'is given together with "reference" — keep one of the',
        ),
        ({"references": []}, "references", 'is an empty list — "reference": "" says that there is none'),
        (
            {"references": ["4", 4]},
            "references[1]",
            "is the number 4 — must be a string or a list of messages",
        ),
        ({"references": "4"}, "references", "is the string '4' — must be a list"),
    ],
)
def test_references_that_cannot_be_used(fields: dict[str, Any], field: str, reason: str) -> None:
    row = {key: value for key, value in pair().items() if key != "reference"}
    with pytest.raises(RowError) as error:
        parse_row({**row, **fields})
    assert error.value.field == field
    assert error.value.reason.startswith(reason)


def test_without_an_id_the_source_is_the_id() -> None:
    assert parse_row(pair()).to_example("f.jsonl:12").id == "f.jsonl:12"


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"chosen": 7}, "chosen", "is the number 7 — must be a string or a list of messages"),
        ({"chosen": None}, "chosen", "is null — must be a string or a list of messages"),
        ({"chosen": {"role": "a"}}, "chosen", "is an object with 'role' — must be a string or"),
        ({"chosen": ["hello"]}, "chosen[0]", "is the string 'hello' — must be an object with"),
        ({"prompt": [{"role": 1, "content": "x"}]}, "prompt[0].role", "is the number 1 — must be a string"),
        ({"prompt": [{"role": "u", "content": None}]}, "prompt[0].content", "is null — must be a string"),
        ({"prompt": [{"role": "u", "content": [{}]}]}, "prompt[0].content", "is a list of 1 — must be a str"),
        ({"prompt": [{"content": "x"}]}, "prompt[0].role", "is missing — add it"),
        ({"weight": 0}, "weight", "must be greater than 0"),
        ({"weight": "2"}, "weight", "is the string '2' — must be a number"),
        ({"weight": True}, "weight", "is true — must be a number"),
        ({"margin": float("nan")}, "margin", "must be a finite number"),
        ({"wrapper": "chat"}, "wrapper", """is the string 'chat' — must be "sft" or "pretrain\""""),
        ({"id": [1]}, "id", "is a list of 1 — must be a string or a whole number"),
        ({"subset": 3}, "subset", "is the number 3 — must be a string"),
        ({"rejected": "\ud83d"}, "rejected", "half of a surrogate pair"),
        ({"chosen": "x" * (2**20 + 1)}, "chosen", "has 1,048,577 characters, and no model reads so many"),
        (
            {"prompt": [{"role": "user", "content": "x" * 2**19}] * 3},
            "prompt",
            "has 1,572,864 characters, and no model reads so many",
        ),
        ({"responses": []}, "responses", "is given together with chosen and rejected — keep one of"),
    ],
)
def test_wrong_values_are_named(changes: dict[str, Any], field: str, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_row(pair(**changes))
    assert caught.value.field == field
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "reference", 'add it; "reference": "" says'),
        (
            {"prompt": "p", "refrence": "", "chosen": "a", "rejected": "b"},
            "reference",
            "the row has 'refrence'; rename it",
        ),
        ({"chosen": "\n\nHuman: hi", "rejected": "x"}, "prompt", "polar-ft data convert hh-rlhf"),
        ({}, "prompt", "(also wrong: reference, chosen, rejected)"),
        ([1], "", "the row is a list of 1 — write one JSON object a line"),
    ],
)
def test_missing_fields_are_named(row: Any, field: str, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_row(row)
    assert caught.value.field == field
    assert reason in caught.value.reason


def test_a_huge_wrong_value_does_not_make_a_huge_message() -> None:
    with pytest.raises(RowError) as caught:
        parse_row(pair(weight="x" * 10**6, chosen=10**3000))
    assert len(str(caught.value)) < 300


def test_null_columns_of_parquet_mean_absent() -> None:
    nulls = {"id": None, "subset": None, "margin": None, "weight": None, "wrapper": None}
    example = parse_row(pair(**nulls)).to_example("f:1")
    assert (example.weights, example.wrapper, example.margins) == ((1.0,), "sft", (None,))


def test_ranked_adjacent_pairs_by_hand() -> None:
    # Scores 1 4 3 3 2: 4 becomes the reference; in order 3 3 2 1 the first two are a tie.
    example = parse_row(ranked(1, 4, 3, 3, 2)).to_example("f:1")
    assert example.reference == "text 1"
    assert example.candidates == ("text 0", "text 2", "text 3", "text 4")
    assert example.pairs == ((2, 3), (3, 0))
    assert example.margins == (1, 1)
    assert example.n_ties == 1


def test_ranked_all_pairs_by_hand() -> None:
    example = parse_row(ranked(1, 4, 3, 3, 2)).to_example("f:1", pairing="all")
    assert example.pairs == ((1, 3), (1, 0), (2, 3), (2, 0), (3, 0))
    assert example.margins == (1, 2, 1, 2, 1)
    assert example.weights == (1.0,) * 5
    assert example.n_ties == 1


def test_ranks_count_from_the_best_and_give_no_margin() -> None:
    example = parse_row(ranked(3, 1, 2, key="rank")).to_example("f:1")
    assert (example.reference, example.candidates) == ("text 1", ("text 0", "text 2"))
    assert (example.pairs, example.margins) == (((1, 0),), (None,))


@pytest.mark.parametrize("reference", ["given", ""])
def test_a_given_reference_leaves_all_responses_as_candidates(reference: str) -> None:
    example = parse_row(ranked(1, 2, reference=reference)).to_example("f:1")
    assert (example.reference, example.pairs, len(example.candidates)) == (reference, ((1, 0),), 2)
    assert example.reference_info == {}


def test_a_row_of_ties_is_an_example_without_pairs() -> None:
    example = parse_row(ranked(1, 1, 1)).to_example("f:1")
    assert (example.pairs, example.n_ties) == ((), 1)


def test_what_the_row_says_of_a_response_is_passed_on() -> None:
    row = ranked(1, 3, 2)
    row["responses"][0] |= {"policy": "small", "tokens": 5}
    example = parse_row(row).to_example("f:1")
    assert example.candidate_info == ({"score": 1.0, "policy": "small", "tokens": 5}, {"score": 2.0})
    assert example.reference_info == {"score": 3.0}


def test_responses_may_be_messages() -> None:
    row = ranked(1, 2, reference="")
    row["responses"][0] = {"messages": MESSAGES, "score": 0}
    assert parse_row(row).to_example("f:1").candidates[0] == "Hi\nHello"


@pytest.mark.parametrize(
    ("responses", "field", "reason"),
    [
        ([{"content": "a", "score": 1}] * 2, "responses", "needs at least 3"),
        ("abc", "responses", "must be a list"),
        (["a", "b", "c"], "responses[0]", 'must be an object with "content"'),
        ([{"content": "a"}] * 3, "responses[0]", 'must have either "score"'),
        ([{"content": "a", "score": 1, "rank": 1}] * 3, "responses[0]", 'must have either "score"'),
        ([{"score": 1}] * 3, "responses[0]", 'must have either "content"'),
        ([{"content": "a", "messages": [], "score": 1}] * 3, "responses[0]", 'must have either "content"'),
        ([{"content": "a", "score": "1"}] * 3, "responses[0].score", "is the string '1' — must be a number"),
        ([{"content": "a", "score": float("inf")}] * 3, "responses[0].score", "must be a finite number"),
        (
            [{"content": "a", "score": 1}, {"content": "a", "rank": 1}, {"content": "b", "rank": 2}],
            "responses",
            "some responses have a score and others a rank",
        ),
    ],
)
def test_wrong_responses_are_named(responses: Any, field: str, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_row({"prompt": "p", "responses": responses})
    assert caught.value.field == field
    assert reason in caught.value.reason


def test_importing_needs_no_heavy_package() -> None:
    import subprocess
    import sys

    code = (
        "import sys, polar_ft.data.commands\n"
        "heavy = {'torch', 'transformers', 'xtuner', 'datasets', 'mmengine'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_responses_make_a_ranked_row() -> None:
    assert isinstance(parse_row(ranked(1, 2, 3)), RankedRow)
    assert isinstance(parse_row(pair()), PairRow)


def test_batches_hold_so_many_rows_and_characters() -> None:
    short, long = (parse_row(pair(prompt="x" * n)).to_example("in:1") for n in (1, 2**19))
    sizes = [len(batch) for batch in batches([*[short] * 5, long, long, short, long, long], 3)]
    assert sizes == [3, 3, 2, 1, 1]
