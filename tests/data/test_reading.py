"""Reading: every kind of file, every kind of damage, flat memory, sources of a config."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from polar_ft.data.reading import (
    DataSource,
    RowProblem,
    as_sources,
    expand,
    read_examples,
    read_rows,
    size_in_bytes,
)
from polar_ft.errors import DataError, PolarError
from tests.data.rows import WriteRows, pair


def problems_of(path: Path | str, **options: Any) -> list[str]:
    return [str(row) for _, row in read_rows(path, **options) if isinstance(row, RowProblem)]


def line(**changes: Any) -> bytes:
    return json.dumps(pair(**changes)).encode() + b"\n"


def test_the_same_rows_from_every_kind_of_file(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [pair(id=str(i), chosen=[{"role": "assistant", "content": f"¡{i}!"}]) for i in range(600)]
    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(text)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    (tmp_path / "notes.txt").write_text("not data")
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        path = tmp_path / name
        counted: list[int] = []
        read = list(read_rows(path, on_bytes=counted.append))
        assert [row for _, row in read] == rows
        assert read[41][0] == f"{path}:42"
        assert 0 <= size_in_bytes(str(path)) - sum(counted) <= 3  # type: ignore[operator]
    assert len(list(read_rows(tmp_path))) == 1800


def test_a_dataset_id_is_loaded_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        return datasets.Dataset.from_list([pair(), pair(chosen="iv")])

    monkeypatch.setattr(datasets, "load_dataset", load)
    read = list(read_examples(DataSource(path="owner/name:config", split="test")))
    assert asked == [(("owner/name", "config"), {"split": "test"})]
    assert [example.source for example in read] == ["owner/name:config[test]:1", "owner/name:config[test]:2"]
    assert size_in_bytes("owner/name") is None


def test_a_dataset_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(PolarError, match=r"owner/name: no such file here, .*ConnectionError: no network"):
        list(read_rows("owner/name"))


@pytest.mark.parametrize("path", ["missing.jsonl", "data/missing.parquet", "/no/such/folder", "../x"])
def test_a_missing_file_is_named_before_anything_is_read(path: str) -> None:
    with pytest.raises(PolarError, match=r"no such file; check the spelling"):
        read_examples([path])


def test_a_name_in_a_folder_that_exists_is_no_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(PolarError, match=r"data/train: no such file; check the spelling"):
        read_examples("data/train")


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("a,b")
    with pytest.raises(PolarError, match=r"rows.txt: cannot read this kind of file; it must end in \.jsonl"):
        read_examples(tmp_path / "rows.txt")
    with pytest.raises(PolarError, match=r"no data in this folder"):
        read_examples(tmp_path)


def test_every_file_of_a_folder_is_listed_once(tmp_path: Path) -> None:
    names = ["A.JSONL", "b.ndjson", "t.parquet/part-0.parquet", "t.parquet/year=2024/part.0.parquet"]
    below = ["deep/c.jsonl", "deep/d.jsonl/part-0.json"]
    ignored = [".hidden.jsonl", "notes.txt", "t.parquet/_temporary/x.parquet", "deep/.git/x.jsonl"]
    for name in [*names, *below, *ignored]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link.jsonl").symlink_to("b.ndjson")
    (tmp_path / "deep" / "circle").symlink_to("..")
    (tmp_path / "z.jsonl").symlink_to("nothing")
    listed = [os.path.relpath(file, tmp_path) for file in expand(str(tmp_path))]
    assert listed == [names[0], names[1], *names[2:], "z.jsonl"]
    listed = [os.path.relpath(file, tmp_path) for file in expand(str(tmp_path), recursive=True)]
    assert listed == [names[0], names[1], *below, *names[2:], "z.jsonl"]


def test_a_link_to_nothing_is_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(PolarError, match=r"a\.jsonl: is a link to .*gone\.jsonl, which does not exist"):
        read_examples(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_bytes(line())
    (_, problem), (_, row) = read_rows(tmp_path)
    assert "a.jsonl:0" not in str(problem)
    assert "is a link to" in str(problem)
    assert row == pair()


def test_parquet_with_a_text_that_is_not_utf8(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = pa.array([b"good", b"caf\xe9", b"good too"], pa.binary())
    table = pa.table({"prompt": pa.Array.from_buffers(pa.string(), 3, texts.buffers())})
    parquet.write_table(table, tmp_path / "rows.parquet")
    (_, first), (_, problem), (_, third) = read_rows(tmp_path / "rows.parquet")
    assert (first, third) == ({"prompt": "good"}, {"prompt": "good too"})
    assert "rows.parquet:2: is not valid UTF-8 (0xe9 at byte 4 of a text)" in str(problem)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "FILE: has no rows — an empty file is not data; check the path"),
        (b"\n \n", "FILE: has no rows — an empty file is not data; check the path"),
        (b"{'a': 1}\n", "FILE:1: is not JSON (Expecting property name"),
        (
            b'{"prompt": "x"',
            "FILE:1: is not JSON (Expecting ',' delimiter, column 15) — write one JSON object",
        ),
        (
            b"[\n{}\n]\n",
            "FILE:1: is not JSON (Expecting value, column 1) — write one JSON object a line, not one",
        ),
        (b"[1]\n", "FILE:1: is a list — write one JSON object a line"),
        (b'"text"\n', "FILE:1: is a string — write one JSON object a line"),
        (b"7\n", "FILE:1: is a number — write one JSON object a line"),
        (b"null\n", "FILE:1: is null — write one JSON object a line"),
        (b'{}\n{"prompt": "caf\xe9"}\n', "FILE:2: is not valid UTF-8 (0xe9 at byte 16 of the line) — save"),
        (b"[" * 100_000 + b"\n", "FILE:1: is nested too deeply"),
        (b'{"id": ' + b"9" * 5000 + b"}\n", "FILE:1: is not JSON (Exceeds the limit"),
    ],
)
def test_damaged_json_lines(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    assert problems_of(path)[0].startswith(problem.replace("FILE", str(path)))


def test_a_bad_line_does_not_hide_the_next_ones(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line() + b"oops\n\n" + line(chosen=3) + line())
    found: list[RowProblem] = []
    good = list(read_examples(path, on_problem=found.append))
    assert [example.source for example in good] == [f"{path}:1", f"{path}:5"]
    assert [(problem.line, problem.field) for problem in found] == [(2, ""), (4, "chosen")]


def test_a_50_mb_line_is_refused_without_being_kept(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        file.write(line() + b'{"prompt": "')
        for _ in range(50):
            file.write(b"x" * 2**20)
        file.write(b'"}\n' + line())
    tracemalloc.start()
    rows = list(read_rows(path, max_line_mb=2))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 2**20
    assert [isinstance(row, RowProblem) for _, row in rows] == [False, True, False]
    assert "2: the line is 50.0 MB, the limit 2 MB — split it, or raise max_line_mb" in str(rows[1][1])
    assert "the limit 32 MB" in problems_of(path)[0]
    assert problems_of(path, max_line_mb=64) == []


def test_a_line_of_just_the_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "edge.jsonl"
    row = json.dumps({"prompt": ""}).encode()
    path.write_bytes(row[:-2] + b"x" * (2**20 - len(row)) + row[-2:] + b"\n")
    assert problems_of(path, max_line_mb=1) == []
    path.write_bytes(row[:-2] + b"x" * (2**20 - len(row) + 1) + row[-2:])
    assert len(problems_of(path, max_line_mb=1)) == 1


def test_damaged_gzip_and_parquet_are_reported(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(line(id=i, prompt=f"{i * i}") for i in range(5000)))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    rows = list(read_rows(tmp_path / "cut.jsonl.gz"))
    assert len(rows) > 100
    assert "the file is damaged; copy it again" in str(rows[-1][1])
    (tmp_path / "fake.jsonl.gz").write_bytes(line())
    assert "the file is damaged" in problems_of(tmp_path / "fake.jsonl.gz")[0]
    pytest.importorskip("pyarrow")
    (tmp_path / "fake.parquet").write_bytes(line())
    assert "is not readable Parquet" in problems_of(tmp_path / "fake.parquet")[0]


def test_raising_names_the_first_twenty_and_counts_all(write_rows: WriteRows) -> None:
    path = write_rows("bad.jsonl", [pair(), *[pair(weight=-1)] * 30])
    examples = read_examples(str(path))
    assert next(examples).source == f"{path}:1"
    with pytest.raises(DataError) as caught:
        list(examples)
    assert len(caught.value.problems) == 30
    message = str(caught.value)
    assert message.startswith("30 rows cannot be used:\n")
    assert f"{path}:2: weight: is the number -1 — must be greater than 0" in message
    assert f"{path}:21:" in message
    assert f"{path}:22:" not in message
    assert message.endswith("… and 10 more; `polar-ft data check --json` lists them all")


def test_sources_of_a_config(write_rows: WriteRows) -> None:
    a = write_rows("a.jsonl", [pair(), pair(weight=3.0), pair()])
    responses = [{"content": text, "score": score} for text, score in (("a", 3), ("b", 2), ("c", 1))]
    b = write_rows("b.jsonl", [{"prompt": "p", "responses": responses, "reference": "r", "subset": "own"}])
    sources = [
        {"path": str(a), "weight": 0.5, "max_samples": 2, "subset": "A"},
        DataSource(path=str(b), pairing="all", subset="B"),
    ]
    first, second, third = read_examples(sources)
    assert (first.weights, second.weights) == ((0.5,), (1.5,))
    assert (first.subset, third.subset) == ("A", "own")
    assert len(third.pairs) == 3
    assert len(list(read_examples(sources, pairing="adjacent"))[2].pairs) == 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "a.jsonl", "wieght": 1}, "unknown key 'wieght'; it may say path, weight, max_samples"),
        ({"path": "a.jsonl", "weight": 0}, "weight: Input should be greater than 0"),
        ({"path": "a.jsonl", "max_samples": 0}, "max_samples: "),
        ({"weight": 1.0}, "path: Field required"),
        ([], "names no file"),
        (7, "names no file"),
    ],
)
def test_wrong_sources_are_named(source: Any, message: str) -> None:
    with pytest.raises(PolarError, match=message):
        as_sources(source)
