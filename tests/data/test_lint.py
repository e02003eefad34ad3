"""The lint: each count derived by hand, flat memory, bad rows that only the tokenizer finds."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_ft.data.lint import DataReport, check, summarize
from polar_ft.data.reading import RowProblem, as_sources
from polar_ft.template import PolarTemplate
from tests.data.rows import WriteRows, pair, ranked
from tests.shared_data import shared_file


@pytest.fixture(scope="module")
def template(tokenizer_folder: Path) -> PolarTemplate:
    return PolarTemplate.from_pretrained(tokenizer_folder, max_length=100, max_response_length=20)


def run(*paths: Path, template: PolarTemplate | None = None) -> DataReport:
    return check(as_sources([str(path) for path in paths]), template)


def test_counts_by_hand(write_rows: WriteRows) -> None:
    a = write_rows(
        "a.jsonl",
        [
            pair(subset="s"),
            pair(subset="s"),  # a duplicate of the first
            pair(chosen="five", rejected="four", subset="t"),  # contradicts the first
            pair(prompt="", reference="", chosen="", rejected="x"),
            pair(chosen="same", rejected="same", extra_field=1),
            pair(reference="five"),  # the reference is the rejected text
            pair(reference="four"),  # the reference is the chosen text
            pair(chosen=3),
        ],
    )
    b = write_rows("b.jsonl", [ranked(4, 3, 2, 2), ranked(1, 1, 1), pair(chosen="IV")])
    report = check(as_sources([str(a), str(b)]))

    assert report.unit == "characters"
    assert (report.rows, report.bad_rows, report.pairs) == (10, 1, 9)
    assert (report.ties_left_out, report.rows_without_pairs) == (2, 1)
    assert report.problems == [RowProblem(str(a), 8, "chosen", report.problems[0].reason)]
    # "2 + 2?", "" and "Which?"; the first of them is in both files.
    assert (report.prompts, report.prompts_in_several_files) == (3, 1)
    assert (report.duplicate_pairs, report.contradictory_pairs) == (1, 1)
    assert report.chosen_equals_rejected == 1
    assert report.chosen_equals_rejected_after_truncation is None
    assert (report.reference_equals_chosen, report.reference_equals_rejected) == (1, 1)
    assert report.empty == {"prompt": 1, "reference": 1, "chosen": 1, "rejected": 0}
    assert (report.chosen_longer, report.chosen_shorter) == (0, 2)  # "" < "x", "IV" < "five"
    assert {name: (n.rows, n.pairs) for name, n in report.subsets.items()} == {
        "s": (2, 2),
        "t": (1, 1),
        "": (7, 6),
    }
    assert report.extra_fields == {"extra_field": 1}
    assert report.truncated == {}
    assert report.lengths["rejected"].max == len("text 2")


def test_findings_name_their_rows_and_fix_writes_the_others(write_rows: WriteRows, tmp_path: Path) -> None:
    rows = [
        pair(id="a"),
        pair(id="a", subset="again"),  # the pair and the id of the first row
        pair(chosen="five", rejected="four"),  # contradicts it
        pair(chosen="same", rejected="same"),
        pair(prompt="", chosen="x"),
        pair(prompt="3 + 3?", id="b", note="kept"),
        pair(weight=0),
        pair(prompt=" held   out"),
        ranked(3, 2, 1),
        ranked(1, 1, 1),
    ]
    path = write_rows("in.jsonl", rows)
    held_out = write_rows("held.jsonl", [pair(prompt="held out")])
    good: list[Mapping[str, Any]] = []
    report = check(as_sources(str(path)), held_out=as_sources(str(held_out)), write=good.append)
    assert good == [rows[0], rows[5], rows[8]]
    assert (report.rows, report.bad_rows, report.held_out_prompts, report.repeated_ids) == (9, 1, 1, 1)
    assert report.named == {
        "duplicate_pairs": [f"{path}:2 (as {path}:1)"],
        "repeated_ids": [f"{path}:2 (a)"],
        "contradictory_pairs": [f"{path}:3 (against {path}:1)"],
        "chosen_equals_rejected": [f"{path}:4"],
        "empty": [f"{path}:5 (prompt)"],
        "held_out_prompts": [f"{path}:8"],
    }
    many = run(write_rows("many.jsonl", [pair()] * 3000))
    assert many.duplicate_pairs == 2999
    assert len(many.named["duplicate_pairs"]) == 20


@pytest.mark.parametrize(("longer", "warnings"), [(18, 0), (19, 1)])
def test_longer_answers_that_nearly_always_win_are_a_warning(
    longer: int, warnings: int, write_rows: WriteRows
) -> None:
    rows = [pair(prompt=f"{i}", chosen="long" if i < longer else "x", rejected="xx") for i in range(20)]
    report = run(write_rows("in.jsonl", [*rows, *[pair(chosen="1", rejected="2")] * 50]))
    assert len(report.warnings) == warnings
    assert not warnings or "95.0% of the pairs of unequal length" in report.warnings[0]


def test_tokens_and_truncation(write_rows: WriteRows, template: PolarTemplate) -> None:
    # One byte a token: none of these letters is ever merged. A field's tokens count its BOS.
    # Budget of the prompt: (100 - 4 - 20 - reference) // 2.
    path = write_rows(
        "long.jsonl",
        [
            pair(prompt="Z" * 9, reference="Q" * 5, chosen="X" * 50, rejected="X" * 60),
            pair(prompt="Z" * 99, reference="Q" * 25, chosen="X", rejected="J"),
        ],
    )
    report = run(path, template=template)
    assert report.unit == "tokens"
    assert (report.max_length, report.max_response_length) == (100, 20)
    assert report.lengths["prompt"].max == 100
    assert report.lengths["chosen"].histogram[0] == (2, 3, 1)
    assert report.lengths["sequence"].max <= 100
    assert (report.truncated["reference"].count, report.truncated["reference"].tokens) == (1, 26 - 20)
    # (100 - 4 - 20 - 20) // 2 = 28 tokens are left of 100.
    assert (report.truncated["prompt"].count, report.truncated["prompt"].tokens) == (1, 72)
    assert (report.truncated["chosen"].count, report.truncated["chosen"].tokens) == (1, 31)
    assert (report.truncated["rejected"].count, report.truncated["rejected"].tokens) == (1, 41)
    assert report.truncated["prompt"].side == "left"
    assert report.chosen_equals_rejected == 0
    assert report.chosen_equals_rejected_after_truncation == 1


def test_a_reference_that_leaves_no_room_is_a_bad_row_among_good_ones(
    write_rows: WriteRows, tokenizer_folder: Path
) -> None:
    template = PolarTemplate.from_pretrained(tokenizer_folder, max_length=50, max_response_length=22)
    path = write_rows("in.jsonl", [pair(), pair(reference="Q" * 500), pair(prompt="again")])
    report = run(path, template=template)
    assert (report.rows, report.bad_rows) == (2, 1)
    assert str(report.problems[0]).startswith(
        f"{path}:2: a reference of 22 tokens leaves the prompt a budget"
    )


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=300))
def test_summary_agrees_with_numpy(lengths: list[int]) -> None:
    summary = summarize(Counter(lengths))
    for percent in (50, 90, 99):
        expected = np.percentile(lengths, percent, method="inverted_cdf")
        assert getattr(summary, f"p{percent}") == expected
    assert summary.mean == pytest.approx(np.mean(lengths), abs=0.01)
    assert summary.max == max(lengths)
    assert sum(count for _, _, count in summary.histogram) == len(lengths)
    for low, high, count in summary.histogram:
        assert count == sum(low <= length <= high for length in lengths)


def test_an_empty_file_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    report = run(tmp_path / "empty.jsonl")
    assert (report.rows, report.bad_rows) == (0, 1)
    assert report.lengths["prompt"].histogram == []


def test_memory_stays_flat(write_rows: WriteRows) -> None:
    # 20 MB of rows; what is remembered of them is 8 bytes of a hash each.
    path = write_rows("big.jsonl", (pair(id=i, prompt=f"{i} " * 120) for i in range(20_000)))
    tracemalloc.start()
    report = run(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.rows == report.prompts == 20_000
    assert peak < 10 * 2**20


def test_full_file(tokenizer_folder: Path) -> None:
    path = shared_file("alpaca_eval_ranked.jsonl.gz")
    template = PolarTemplate.from_pretrained(tokenizer_folder)
    sources = as_sources({"path": str(path), "max_samples": 100, "pairing": "all"})
    report = check(sources, template)
    assert (report.rows, report.bad_rows) == (100, 0)
    assert report.pairs + report.ties_left_out == 100 * 78
    assert report.chosen_longer > report.chosen_shorter
    whole = run(path)
    assert (whole.rows, whole.bad_rows, whole.prompts) == (805, 0, 805)
