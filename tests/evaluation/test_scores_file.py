"""Saved scores, ours and other tools', and what is said of those that cannot be used."""

from __future__ import annotations

import gzip
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polar_ft.errors import PolarError
from polar_ft.evaluation.scores_file import read_scores
from polar_ft.evaluation.statistics.benchmarks import benchmarks


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
    assert (table.contents.tolist(), table.contents_of) == ([0x0123456789ABCDEF] * 3, "input_hash")


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
        f"{path}: chosen_chars is missing in 1 of 2 rows, so it is left out with the figures that need it."
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
            "s.jsonl:2: rejected_score: is missing — the row has cho",
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
        ("s.jsonl", lines(GOOD) + "[1]\n", "s.jsonl:2: is a list — write one JSON object a line"),
        ("s.jsonl", "", "s.jsonl: has no rows"),
        (
            "s.jsonl",
            b'{"chosen_score": 1, "rejected_score": 0, "id": "\xff"}\n',
            "s.jsonl:1: is not valid UTF-8",
        ),
        (
            "s.csv",
            "chosen,rejected_score\n1,2\n",
            "s.csv:2: chosen_score: is missing — the row has chosen, rejected_score",
        ),
        ("s.csv", "chosen_score,rejected_score\n1,2\n3\n", "s.csv:3: has 1 cells, but there are 2 columns"),
        ("s.csv", "chosen_score,rejected_score\n1,\n", "s.csv:2: rejected_score: is missing"),
        (
            "s.csv",
            "chosen_score,chosen_score,rejected_score\n1,2,3\n",
            "s.csv:1: has the column 'chosen_score' twice",
        ),
        (
            "s.csv",
            'chosen_score,rejected_score,id\n1,x,"a\nb"\n',
            's.csv:2: rejected_score: is "x" — must be a',
        ),
        ("s.csv.gz", b"not gzip", "s.csv.gz: cannot be read"),
        ("s.parquet", "x", "s.parquet: is not readable Parquet"),
        ("s.txt", "x", "s.txt: cannot read this kind of file; it must end in .jsonl"),
        ("s.jsonl", lines({"quality": 1}), "s.jsonl:1: no scores: two columns such as chosen_score and"),
        (
            "s.jsonl",
            lines({"score_chosen": 9, "score_rejected": 2, "chosen_reward": 0.5, "rejected_reward": 0.1}),
            "s.jsonl:1: the rows have several pairs of scores (score_chosen and score_rejected, chosen_rew",
        ),
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
        PolarError, match=r"no row has the field 'language' of --subset-by.*chosen_score, rej"
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


def test_two_objects_in_one_line_are_no_two_rows(write):
    path = write('{"chosen_score": 1}, {"rejected_score": 2}\n\n' + lines(GOOD))
    with pytest.raises(PolarError, match=r"scores\.jsonl:1: is not JSON") as error:
        read_scores(path)
    assert len(error.value.problems) == 1


def margins(path):
    return read_scores(path).table.margins.tolist()


def test_every_form_in_which_data_are_read(write, tmp_path):
    """The same three pairs in each."""
    rows = [{"chosen_score": a, "rejected_score": b, "id": f"p{a}"} for a, b in ((1, 0.5), (2, 4), (3, 3))]
    listed = json.dumps(rows)
    table = "".join(f"{r['chosen_score']};{r['rejected_score']};{r['id']}\n" for r in rows)
    table = f"chosen_score;rejected_score;id\n{table}"
    files = [
        write(listed, "list.json"),
        write(gzip.compress(listed.encode()), "list.json.gz"),
        write(lines(*rows), "lines.json"),
        write(table, "semicolon.csv"),
        write(table.replace(";", "\t"), "tab.csv"),
        write(table.replace(";", ","), "comma.tsv"),
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "scores.parquet")
    parts = tmp_path / "parts"
    parts.mkdir()
    for n, row in enumerate(rows):
        (parts / f"{n}.jsonl").write_text(lines(row))
    for path in (*files, tmp_path / "scores.parquet", parts):
        saved = read_scores(path)
        assert (saved.table.margins.tolist(), saved.table.ids) == ([0.5, -2, 0], ["p1", "p2", "p3"]), path


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("score_chosen", "score_rejected"),
        ("chosen_reward", "rejected_reward"),
        ("rewards_chosen", "rewards_rejected"),
        ("chosen_rewards", "reject_rewards"),
        ("chosen", "rejected"),
    ],
)
def test_the_names_that_others_write(write, chosen, rejected):
    saved = read_scores(write(lines({chosen: 1.5, rejected: 0.25}, {chosen: 0, rejected: "NaN"})))
    assert saved.table.margins[0] == 1.25
    assert np.isnan(saved.table.margins[1])
    assert saved.form == f"the columns {chosen} and {rejected}"


def test_texts_are_known_by_their_content(write):
    """So that runs of another tool are compared by texts, whatever the order and the ids."""
    pair = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", **GOOD}
    one = read_scores(write(lines(pair, {**pair, "chosen": "four"}), "a.jsonl")).table
    other = read_scores(write(lines({**pair, "chosen": "four", "id": 1}, pair), "b.jsonl")).table
    assert one.contents.tolist() == other.contents.tolist()[::-1]
    assert one.contents_of == other.contents_of == "texts"


# The first six of the 849 rows that RMB publishes for ArmoRM-Llama3-8B-v0.1, is_correct included.
RMB_RESULT = [
    ("9218", 0.1767578125, 0.169921875, 1),
    ("9219", 0.185546875, 0.169921875, 1),
    ("9220", 0.1884765625, 0.1689453125, 1),
    ("9221", 0.1943359375, 0.169921875, 1),
    ("9222", 0.1767578125, 0.1630859375, 1),
    ("9223", 0.1884765625, 0.1630859375, 1),
]


def test_results_of_rmb(write):
    rows = [
        {
            "pair_uid": uid,
            "category_path": "Pairwise_set/Helpfulness/Brainstorming/Idea Development",
            "chosen_reward": chosen,
            "reject_reward": rejected,
            "is_correct": correct,
        }
        for uid, chosen, rejected, correct in RMB_RESULT
    ]
    table = read_scores(write(json.dumps(rows, indent=2), "ArmoRM_result.json")).table
    assert (table.margins > 0).tolist() == [row["is_correct"] == 1 for row in rows]
    assert table.ids == [row["pair_uid"] for row in rows]
    assert table.subsets["subset"].names == ["Helpfulness/Brainstorming/Idea Development"]


def test_results_of_rewardbench(write):
    """As its scripts write them: a row a line, an object of columns, or the scores alone."""
    pairs = [(7, "mt-bench-easy", 2.5, 1.0), (8, "math-prm", -1.0, 0.5), (9, "math-prm", 0.5, 0.5)]
    results = [1, 0, 0]  # as the script counts: chosen above rejected
    by_line = lines(
        *(
            {"prompt": "q", "results": r, "scores_chosen": a, "scores_rejected": b, "subset": s, "id": i}
            for (i, s, a, b), r in zip(pairs, results, strict=True)
        )
    )
    ids, subsets, chosen, rejected = map(list, zip(*pairs, strict=True))
    columns = {
        "chat_template": "tulu",
        "id": ids,
        "model": "org/model",
        "results": results,
        "scores_chosen": [[score] for score in chosen],  # some models give lists of one
        "scores_rejected": [[score] for score in rejected],
        "subset": subsets,
        "text_chosen": ["q a"] * 3,
        "text_rejected": ["q b"] * 3,
    }
    files = (
        write(by_line, "m_outputs.jsonl"),
        write(json.dumps(columns, indent=4, sort_keys=True), "m.json"),
    )
    for path in (*files, write(json.dumps(columns), "one_line.json")):
        table = read_scores(path).table
        assert ((table.margins > 0).astype(int).tolist(), table.ids) == (results, ["7", "8", "9"])
        assert table.subsets["subset"].names == ["math-prm", "mt-bench-easy"]
    only = lines(*({"chosen": a, "rejected": b} for _, _, a, b in pairs))
    assert margins(write(only, "m_all.jsonl")) == [1.5, -1.5, 0]


def test_results_of_rewardbench_2_have_its_summary(write):
    """Focus: 1/2 of (1, 0); Ties by hand: both forms right, margins 2 and 1 against a spread of 0.5."""
    columns = {
        "id": ["1", "2", "ref:0", "tied:0"],
        "subset": ["Focus", "Focus", "Ties", "Ties"],
        "num_correct": [1, 1, 1, 2],
        "scores": [[2.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0], [3.0, 1.0], [[3.0], [2.5], [1.5]]],
        "results": [0.5, 0, 1, None],
        "model": "m",
    }
    saved = read_scores(write(json.dumps(columns, indent=4), "m.json"))
    summary = benchmarks(saved.rankings).rewardbench_2
    assert summary.subsets["Focus"] == (0.5 + 0) / 2
    ties = summary.ties
    assert (ties.ref_accuracy, ties.tied_accuracy, ties.correctness_preferred) == (1, 1, 1)
    # tanh(min(2, 1) / 0.5 − 1)
    assert ties.score == pytest.approx(0.3 + 0.3 + 0.2 + 0.2 + 0.01 * math.tanh(1))
    # Pairs: 3 + 3 + 1 + 2.
    assert len(saved.table) == 9
    assert saved.table.ids[-2:] == ["tied:0 (0>2)", "tied:0 (1>2)"]


def test_results_of_judgebench(write):
    def row(label, scores, source="livebench-math"):
        judged = {"judgment": {"judge_model": "m", "prompt": "", "response": "", "scores": scores}}
        texts = {"question": "q", "response_A": "a", "response_B": "b"}
        return {"pair_id": label, "source": source, "label": label, "judgments": [judged], **texts}

    rows = (row("A>B", [1.88, 1.26]), row("B>A", [2.0, 0.5], "mmlu-pro-law"))
    table = read_scores(write(lines(*rows))).table
    assert table.margins.tolist() == pytest.approx([0.62, -1.5])
    assert table.subsets["subset"].names == ["livebench-math", "mmlu-pro-law"]
    broken = {**rows[0], "judgments": [None]}
    with pytest.raises(PolarError, match=r"scores\.jsonl:2: is no result of a reward model"):
        read_scores(write(lines(rows[0], broken)))
