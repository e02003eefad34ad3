"""Saved scores, ours and other tools', and what is said of those that cannot be used."""

from __future__ import annotations

import gzip
import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polar_ft.errors import PolarError
from polar_ft.evaluation.scores_file import read_blocks, read_scores


@pytest.fixture
def write(tmp_path):
    def to_file(text, name="scores.jsonl"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return to_file


def lines(*rows):
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def test_two_columns_are_enough(write):
    saved = read_scores(write(lines({"chosen_score": 1, "rejected_score": 0.5}), "other.jsonl"))
    table = saved.table
    assert (table.chosen_score.tolist(), table.rejected_score.tolist()) == ([1.0], [0.5])
    assert (table.ids, table.prompts, table.chosen_chars, table.cut, table.subsets) == (None,) * 4 + ({},)
    assert (saved.rankings, saved.cut, saved.n_same_reference, saved.warnings) == ([], None, None, [])


def test_every_column_of_json_lines(write):
    row = {
        "id": "a",
        "subset": "chat",
        "prompt_id": "p",
        "chosen_score": "NaN",
        "rejected_score": "-Infinity",
        "chosen_chars": 3,
        "rejected_chars": 4.0,
        "chosen_tokens": 1,
        "rejected_tokens": 2,
        "cut": {"prompt": 0, "reference": 0, "chosen": 7, "rejected": 1},
        "reference_is_chosen": True,
        "chosen_rouge": 0.5,
        "rejected_rouge": None,
        "shuffled_reference": {"chosen_score": 0.25, "rejected_score": "Infinity", "same_reference": True},
        "empty_reference": {"chosen_score": 1, "rejected_score": 2},
        "input_hash": "0123456789abcdef0123",
        "extra": {"language": "zh", "turns": 2},
    }
    other = {**row, "id": 7, "prompt_id": "q", "cut": {**row["cut"], "chosen": 0, "rejected": 0}}
    other["extra"] = {"language": "en"}
    third = {**other, "pair": [2, 1], "prompt_id": "p"}
    saved = read_scores(write(lines(row, other, third)), ["language", "turns"])
    table = saved.table
    assert np.isnan(table.chosen_score).all()
    assert (table.rejected_score == -math.inf).all()
    assert table.ids == ["a", "7", "7 (2>1)"]
    assert table.prompts.tolist() == [0, 1, 0]
    assert (table.chosen_chars.tolist(), table.rejected_chars.tolist()) == ([3] * 3, [4] * 3)
    assert (table.cut.tolist(), saved.cut) == (
        [True, False, False],
        {"prompt": 0, "reference": 0, "chosen": 1, "rejected": 1},
    )
    assert table.reference_is_chosen.all()
    assert (table.chosen_rouge.tolist(), table.rejected_rouge) == ([0.5] * 3, None)
    assert (table.shuffled_chosen.tolist(), table.shuffled_rejected.tolist()) == ([0.25] * 3, [math.inf] * 3)
    assert saved.n_same_reference == 3
    assert (table.empty_chosen.tolist(), table.empty_rejected.tolist()) == ([1.0] * 3, [2.0] * 3)
    assert list(table.subsets) == ["subset", "language", "turns"]
    language = table.subsets["language"]
    assert [language.names[code] for code in language.codes] == ["zh", "en", "en"]
    assert table.subsets["turns"].names == ["(no turns)", "2"]
    assert saved.input_hashes.tolist() == [0x0123456789ABCDEF] * 3


def test_csv_with_a_byte_order_mark_quotes_and_gaps(write):
    text = (
        "\ufeffid,chosen_score,rejected_score,subset,chosen_chars,cut\r\n"
        '"a, b",1.5,NaN,chat,10,true\r\n'
        "c,-2,0,,20,false\r\n"
    )
    for path in (write(text, "scores.csv"), write(gzip.compress(text.encode()), "scores.csv.gz")):
        table = read_scores(path).table
        assert table.ids == ["a, b", "c"]
        assert table.chosen_score.tolist() == [1.5, -2.0]
        assert np.isnan(table.rejected_score[0])
        assert table.subsets["subset"].names == ["(no subset)", "chat"]
        assert table.chosen_chars.tolist() == [10, 20]
        assert table.cut.tolist() == [True, False]


def test_tabs(write):
    table = read_scores(write("chosen_score\trejected_score\n1\t2\n", "scores.tsv")).table
    assert table.margins.tolist() == [-1.0]


def test_a_column_that_some_lines_lack_is_left_out_and_said(write):
    path = write(
        lines(
            {"chosen_score": 1, "rejected_score": 0, "id": "a", "chosen_chars": 1},
            {"chosen_score": 1, "rejected_score": 0, "id": "b"},
        )
    )
    saved = read_scores(path)
    assert saved.table.chosen_chars is None
    assert saved.table.ids == ["a", "b"]
    assert saved.warnings == [
        f"{path}: chosen_chars is missing in 1 of 2 lines, so it is left out with the figures that need it."
    ]


def test_prompts_are_known_by_their_text_where_there_is_no_id(write):
    rows = [{"chosen_score": 1, "rejected_score": 0, "prompt": text} for text in ("x", "y", "x")]
    assert read_scores(write(lines(*rows))).table.prompts.tolist() == [0, 1, 0]


GOOD = {"chosen_score": 1.0, "rejected_score": 0.0}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "s.jsonl",
            lines(GOOD, {"chosen_score": 1}),
            "s.jsonl:2: rejected_score: is missing — the line has cho",
        ),
        (
            "s.jsonl",
            lines(GOOD, {**GOOD, "chosen_score": "good"}),
            's.jsonl:2: chosen_score: is "good" — must be',
        ),
        (
            "s.jsonl",
            lines({**GOOD, "chosen_score": True}),
            "s.jsonl:1: chosen_score: is true — must be a number",
        ),
        ("s.jsonl", lines({**GOOD, "chosen_score": None}), "s.jsonl:1: chosen_score: is missing"),
        ("s.jsonl", lines({**GOOD, "chosen_chars": -1}), "s.jsonl:1: chosen_chars: is -1 — must be a whole"),
        ("s.jsonl", lines({**GOOD, "chosen_chars": 10**30}), "s.jsonl:1: chosen_chars: is 1000"),
        ("s.jsonl", lines({**GOOD, "cut": "maybe"}), 's.jsonl:1: cut: is "maybe" — must be true or false'),
        ("s.jsonl", lines(GOOD) + "\n" + '{"chosen_score":\n', "s.jsonl:3: is not JSON"),
        ("s.jsonl", lines(GOOD) + "[1]\n", "s.jsonl:2: is [1] — write one JSON object a line"),
        ("s.jsonl", "[\n{}]\n", "s.jsonl:1: is a list — write one JSON object a line"),
        ("s.jsonl", "", "s.jsonl: has no lines"),
        (
            "s.jsonl",
            b'{"chosen_score": 1, "rejected_score": 0, "id": "\xff"}\n',
            "s.jsonl: is not valid UTF-8",
        ),
        (
            "s.csv",
            "chosen,rejected_score\n1,2\n",
            "s.csv:1: no column 'chosen_score'; the first line must name",
        ),
        ("s.csv", "chosen_score,rejected_score\n1,2\n3\n", "s.csv:3: has 1 cells, the first line 2 columns"),
        ("s.csv", "chosen_score,rejected_score\n1,\n", "s.csv:2: rejected_score: is missing"),
        (
            "s.csv",
            "chosen_score,chosen_score,rejected_score\n",
            "s.csv:1: column 'chosen_score' stands there twice",
        ),
        (
            "s.csv",
            'chosen_score,rejected_score,id\n1,x,"a\nb"\n',
            's.csv:3: rejected_score: is "x" — must be a',
        ),
        ("s.csv.gz", b"not gzip", "s.csv.gz: cannot be read"),
        ("s.parquet", "x", "s.parquet: cannot read this kind of file; let its name end in .jsonl"),
    ],
)
def test_errors_name_file_line_and_column(write, name, text, message):
    path = write(text, name)
    with pytest.raises(PolarError) as error:
        read_scores(path)
    assert str(path.parent / message) in " ".join(str(error.value).split())


def test_many_errors_are_counted(write):
    with pytest.raises(PolarError) as error:
        read_scores(write(lines(*[{"chosen_score": 1}] * 50)))
    assert "… and 30 more" in str(error.value)
    assert str(error.value).count("rejected_score: is missing") == 20


def test_a_field_that_nothing_has(write):
    with pytest.raises(
        PolarError, match=r"no line has the field 'language' of --subset-by.*chosen_score, rej"
    ):
        read_scores(write(lines(GOOD)), ["language"])


def test_a_field_with_a_value_for_each_row(write):
    path = write(lines(*({**GOOD, "id": f"{row}"} for row in range(1001))))
    with pytest.raises(PolarError, match=r"field id has more than 1000 different values"):
        read_scores(path, ["id"])


def test_no_such_folder(tmp_path):
    with pytest.raises(PolarError, match=r"no scores\.jsonl in this folder"):
        read_scores(tmp_path)
    with pytest.raises(PolarError, match="no such file"):
        read_scores(tmp_path / "nowhere")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(), st.floats(), st.text(st.characters(exclude_categories=["Cs"]))), min_size=1
    )
)
def test_what_is_written_is_read_back(write, rows):
    """Any floats and any names, blank lines between them, through the fast path and the slow one."""
    as_json = [
        {"chosen_score": a if math.isfinite(a) else str(a), "rejected_score": b, "id": name}
        for a, b, name in rows
    ]
    path = write("\n".join(lines(row) for row in as_json))
    table = read_scores(path).table
    np.testing.assert_array_equal(table.chosen_score, [a for a, _, _ in rows])
    np.testing.assert_array_equal(table.rejected_score, [b for _, b, _ in rows])
    assert table.ids == [name for _, _, name in rows]


def test_two_objects_in_one_line_are_no_two_lines(write):
    path = write('{"a": 1}, {"b": 2}\n\n{"c": 3}\n')
    problems = []
    blocks = list(read_blocks(path, lambda *problem: problems.append(problem)))
    assert [(list(block.numbers), block.rows) for block in blocks] == [([3], [{"c": 3}])]
    assert [line for line, _, _ in problems] == [1]
