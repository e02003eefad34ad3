"""CSV, TSV and Excel workbooks: which cells become what, and what is wrong with a table."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from polar_ft.data.converters import convert_file, parse_mapping
from polar_ft.data.problems import FileProblem, RowProblem
from polar_ft.data.reading import read_examples, read_rows

HEADER = "prompt,reference,chosen,rejected,margin,subset\n"
GOOD = "2 + 2?,,4,5,0.5,sums\n"
ROW = {"prompt": "2 + 2?", "reference": "", "chosen": "4", "rejected": "5", "margin": 0.5, "subset": "sums"}


def read(path: Path, content: str | bytes, **settings: Any) -> list[Any]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [row for _, row in read_rows(path, **settings)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", HEADER + GOOD),
        ("a.CSV", HEADER + GOOD),
        ("a.csv", "\ufeff" + HEADER + GOOD),
        ("a.csv", (HEADER + GOOD).replace("\n", "\r\n")),
        ("a.csv", (HEADER + GOOD).replace(",", ";")),
        ("a.csv", (HEADER + GOOD).replace(",", "\t")),
        ("a.tsv", (HEADER + GOOD).replace(",", "\t")),
        ("a.csv", "\n" + HEADER + "\n,,,,,\n" + GOOD),
        ("a.csv", HEADER.replace("\n", ",\n") + GOOD.replace("\n", ",\n")),
        (
            "a.csv",
            '"prompt","reference","chosen","rejected","margin","subset"\n"2 + 2?","","4","5","0.5","sums"',
        ),
        ("a.csv.gz", gzip.compress((HEADER + GOOD).encode())),
    ],
)
def test_delimiter_quotes_and_bom_are_found(tmp_path: Path, name: str, content: str | bytes) -> None:
    assert read(tmp_path / name, content) == [ROW]
    (example,) = read_examples(tmp_path / name)
    assert (example.candidates, example.margins, example.references) == (("4", "5"), (0.5,), ("",))


def test_texts_with_delimiters_line_breaks_and_quotes(tmp_path: Path) -> None:
    columns = ["prompt", "chosen", "rejected", "id"]
    texts = ['a, b; c\t"d"', "two\nlines", "ünïcode – 中文", "007"]
    out = io.StringIO()
    csv.writer(out).writerows([columns, texts, texts])
    (tmp_path / "a.csv").write_text(out.getvalue(), encoding="utf-8")
    (at, first), (then, second) = read_rows(tmp_path / "a.csv")
    assert first == second == dict(zip(columns, texts, strict=True))
    assert (at, then) == (f"{tmp_path}/a.csv:2", f"{tmp_path}/a.csv:4")


def test_messages_in_cells_are_read_as_json_and_as_python_prints_them(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "It's 2 + 2?"}]
    for text in (json.dumps(turns), repr(turns)):
        out = io.StringIO()
        csv.writer(out).writerows([["prompt", "chosen", "note"], [text, "4", '[{"a": 1}]']])
        (row,) = read(tmp_path / "a.csv", out.getvalue())
        assert row == {"prompt": turns, "chosen": "4", "note": '[{"a": 1}]'}


@pytest.mark.parametrize(
    ("content", "line", "reason", "rest"),
    [
        (HEADER + GOOD + "1,2,3\n" + GOOD, 3, "has 3 cells, but there are 6 columns (prompt, reference", 2),
        (HEADER + "a,b,c,d,1,s,more\n" + GOOD, 2, "has 7 cells, but there are 6 columns", 1),
        (HEADER.encode() + b"caf\xe9,,4,5,1,s\n" + GOOD.encode(), 2, "is not valid UTF-8 (0xe9 at byte 4", 1),
    ],
)
def test_a_bad_row_loses_no_other(
    tmp_path: Path, content: str | bytes, line: int, reason: str, rest: int
) -> None:
    rows = read(tmp_path / "a.csv", content)
    (problem,) = [row for row in rows if isinstance(row, RowProblem)]
    assert (problem.line, isinstance(problem, FileProblem)) == (line, False)
    assert problem.reason.startswith(reason)
    assert rows.count(ROW) == rest


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ("prompt,chosen,prompt\n1,2,3\n", 1, "has the column 'prompt' twice"),
        ("prompt\n1\n", 1, "does not begin with a line of two or more names"),
        (HEADER + GOOD + '"2 + 2?,,4,5,0.5,sums\n' + GOOD, 3, "is not CSV (unexpected end of data)"),
        (HEADER + '"a"b,,4,5,1,s\n', 2, "is not CSV ("),
        (HEADER + f'"{"a" * 3000},,4,5,1,s\n', 2, "the row is over the limit of 0.002"),
        ("PK\x03\x04, a\n", 0, "is a ZIP archive"),
        ("version https://git-lfs.github.com/spec/v1\noid 1\n", 0, "is a Git LFS pointer"),
        ("", 0, "has no rows"),
        (HEADER, 0, "has no rows"),
    ],
)
def test_what_ends_a_table(tmp_path: Path, content: str, line: int, reason: str) -> None:
    problem = read(tmp_path / "a.csv", content, max_line_mb=0.002)[-1]
    assert problem.line == line
    assert problem.reason.startswith(reason)
    assert isinstance(problem, FileProblem) or reason == "has no rows"


def test_a_compressed_table_that_was_cut_off(tmp_path: Path) -> None:
    content = gzip.compress((HEADER + GOOD * 5_000).encode())
    rows = read(tmp_path / "a.csv.gz", content[:-20])
    assert isinstance(rows[-1], FileProblem)
    assert "cannot be read further" in rows[-1].reason


def test_memory_does_not_grow_with_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(HEADER + GOOD.replace("sums", "s" * 300) * 10_000)
    tracemalloc.start()
    assert sum(1 for _ in read_rows(tmp_path / "a.csv")) == 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def workbook(path: Path, rows: list[list[Any]], *more: str) -> Path:
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    for title in more:
        book.create_sheet(title)
    book.save(path)
    return path


COLUMNS = ["prompt", "chosen", "rejected", "margin", "reference"]


def test_a_workbook_is_read_like_a_table(tmp_path: Path) -> None:
    rows = [COLUMNS, ["2 + 2?", 4, 5.0, 0.5, None], [], ["True?", True, "no\r\nnever_x000D_", 1, "yes"]]
    path = workbook(tmp_path / "a.xlsx", rows, "empty")
    (at, first), (_, second) = read_rows(path)
    assert at == f"{path}:2"
    assert first == {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "margin": 0.5, "reference": ""}
    assert isinstance(second, dict)
    assert (second["chosen"], second["margin"]) == ("TRUE", 1)
    assert second["rejected"].startswith("no\nnever")


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], "has no rows"),
        ([["prompt", "prompt"]], "has the column 'prompt' twice"),
        ([COLUMNS, ["a", "#REF!", "b", 1, ""]], "the cell B2 is the error #REF!"),
        ([COLUMNS, ["a", "b" * 32_767, "b", 1, ""]], "the cell B2 has 32,767 characters"),
    ],
)
def test_what_is_wrong_with_a_workbook(tmp_path: Path, rows: list[list[Any]], reason: str) -> None:
    ((_, problem),) = read_rows(workbook(tmp_path / "a.xlsx", rows))
    assert isinstance(problem, RowProblem)
    assert problem.reason.startswith(reason)


def test_a_workbook_of_two_sheets_and_a_damaged_one(tmp_path: Path) -> None:
    path = workbook(tmp_path / "a.xlsx", [COLUMNS])
    book = openpyxl.load_workbook(path)
    book.create_sheet("Other").append(["x"])
    book.save(path)
    ((_, problem),) = read_rows(path)
    assert "has rows in several sheets (Sheet, Other)" in str(problem)
    path.write_bytes(path.read_bytes()[:-200])
    ((_, problem),) = read_rows(path)
    assert isinstance(problem, FileProblem)
    assert "is not a readable Excel workbook" in str(problem)


def test_columns_are_mapped(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,good,bad,gold,delta\n2 + 2?,4,5,four,0.5\n2 + 3?,,6,five,1\n")
    mapping = parse_mapping(["prompt=question,chosen=good,rejected=bad", "reference=gold,margin=delta"])
    done = convert_file("chat-pairs", str(tmp_path / "a.csv"), tmp_path / "out.jsonl", mapping=mapping)
    (example,) = read_examples(tmp_path / "out.jsonl")
    assert (example.prompt, example.references, example.margins) == ("2 + 2?", ("four",), (0.5,))
    assert [str(problem) for problem in done.problems] == [
        f"{tmp_path}/a.csv:3: good: is missing, but --map chosen=good names it — the row has question, bad, "
        "gold, delta"
    ]
