"""Lists of rows: the same rows whatever the indent and wherever the reading stops; broken lists are named."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_ft.data import json_list
from polar_ft.data.json_list import BrokenListError, entries
from polar_ft.data.reading import RowProblem, read_rows

ROWS = [{"prompt": 'é[]{},"x\\', "n": [1, {"a": None}]}, {}, {"t": "long " * 100}]
VALUES = st.recursive(
    st.none() | st.booleans() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3), max_leaves=5
)


@given(
    rows=st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), max_size=6),
    indent=st.sampled_from([None, 0, 1, 4]),
    ascii_only=st.booleans(),
    read=st.integers(1, 40),
)
def test_entries_are_those_of_json_loads(
    rows: list[dict[str, Any]], indent: int | None, ascii_only: bool, read: int
) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    before, json_list._READ = json_list._READ, read
    try:
        assert list(entries(io.BytesIO(f" \n{text} \n".encode()), 10_000)) == rows
    finally:
        json_list._READ = before


@pytest.mark.parametrize("name", ["rows.json", "rows.json.gz"])
def test_a_file_that_is_one_list_is_read(name: str, tmp_path: Path) -> None:
    path, text = tmp_path / name, "\ufeff" + json.dumps(ROWS, indent=2, ensure_ascii=False)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    sizes: list[int] = []
    rows = list(read_rows(path, on_bytes=sizes.append))
    assert rows == [(f"{path}:{number}", row) for number, row in enumerate(ROWS, start=1)]
    assert sum(sizes) == path.stat().st_size


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('[{"a": 1}', 2, "has the end of the file where a comma or the end of the list belongs"),
        ('[{"a": 1} {"b": 2}]', 2, "has '{' where a comma"),
        ('[{"a": 1}, {"b": 2', 2, "is not JSON (Expecting ',' delimiter)"),
        ('[{"a": 1},]', 2, "is not JSON (Expecting value)"),
        ('[{"a": 1}] {', 2, "continues after the end of the list"),
        ('[{"a": 1}, {"b": "' + "x" * 3000 + '"}]', 2, "is over the limit of 1,048 characters"),
        ('[{"a": 1}, ' + "[" * 100_000, 2, "is nested too deeply to be a row"),
        ('[{"a": 1}, 5]', 2, "is a number — every entry of the list must be a JSON object"),
        ("[]", 0, "has no rows"),
    ],
)
def test_what_is_wrong_with_a_list_is_named(text: str, line: int, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    *good, (_, problem) = read_rows(path, max_line_mb=0.001)
    assert [row for _, row in good] == ([{"a": 1}] if line else [])
    assert isinstance(problem, RowProblem)
    assert problem.line == line
    assert reason in problem.reason


def test_a_damaged_or_wrongly_encoded_list_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.json.gz"
    path.write_bytes(gzip.compress(json.dumps(ROWS * 10_000).encode())[:-2000])
    *_, (_, problem) = read_rows(path)
    assert isinstance(problem, RowProblem)
    assert "the file is damaged" in problem.reason
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"a": "\xe9"}]')
    ((_, problem),) = read_rows(path)
    assert isinstance(problem, RowProblem)
    assert "is not valid UTF-8" in problem.reason


def test_lines_in_a_json_file_are_read_as_before(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    assert [row for _, row in read_rows(path)] == ROWS


def test_what_is_no_list_is_said() -> None:
    with pytest.raises(BrokenListError, match="is not a list"):
        list(entries(io.BytesIO(b'{"a": 1}'), 100))
