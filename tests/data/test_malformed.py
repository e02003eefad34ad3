"""Damaged files in every mode: no traceback, no bad row accepted, no good one refused, right line numbers."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from polar_ft.client.bulk.scoring import check_rows
from polar_ft.data.converters import Conversion, convert_file
from polar_ft.data.lint import check
from polar_ft.data.preview import read_example, run_text, token_runs
from polar_ft.data.problems import FileProblem, RowProblem
from polar_ft.data.reading import DataSource, read_examples, read_rows
from polar_ft.data.report import report_as_json, show_problems, show_report
from polar_ft.data.split import split_by_prompt
from polar_ft.errors import DataError, PolarError
from polar_ft.evaluation.scale import read_groups
from polar_ft.template import PolarTemplate
from tests.data.malformed import END, GOOD, LIMIT_MB, DataCase, all_cases


@pytest.fixture(scope="module")
def template(tokenizer_folder: Path) -> PolarTemplate:
    return PolarTemplate.from_pretrained(tokenizer_folder)


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_file(case: DataCase, tmp_path: Path, template: PolarTemplate) -> None:
    (tmp_path / "in").mkdir()
    path = os.path.join(tmp_path, "in", os.fsdecode(case.file))
    Path(path).write_bytes(case.content)
    source = DataSource(path=path, max_line_mb=LIMIT_MB)

    problems: list[RowProblem] = []
    examples = list(read_examples(source, on_problem=problems.append))
    good = [int(example.source.rpartition(":")[2]) for example in examples]
    bad = [problem.line for problem in problems]
    assert good == (good if case.good is None else list(case.good))
    assert bad == (bad if case.bad is None else list(case.bad))
    assert bool(problems) == (case.bad is None or bool(case.bad))
    assert not problems or case.says in str(problems[0]).replace(r"\\", "\\")
    assert any(isinstance(problem, FileProblem) for problem in problems) == case.damaged

    screen = _Screen()
    # Drawing the tables takes most of the time; what could be wrong in them are characters of the data.
    _check(source, good, bad, screen, tables="good" in case.name or not isinstance(case.file, str))
    _convert(path, tmp_path / "out", good, problems, screen)
    _split(source, tmp_path / "sides", good, bad)
    _preview(source, template, screen)
    for read in (
        lambda: list(read_examples(source)),
        lambda: read_groups([path]),
        # A reward belongs to one reference.
        *([] if "references" in case.name else [lambda: check_rows(source, lambda *_: None)]),
    ):
        if bad:
            with pytest.raises(DataError) as caught:
                read()
            screen.print(str(caught.value))
        else:
            read()
    screen.assert_clean()


class _Screen:
    """What a terminal would get."""

    def __init__(self) -> None:
        self.console = Console(file=io.StringIO(), width=100, highlight=False)
        self.print = self.console.print

    def assert_clean(self) -> None:
        text = self.console.file.getvalue()  # type: ignore[attr-defined]
        text.encode()
        assert not [char for char in text if (char < " " and char not in "\n\t") or "\x7f" <= char < "\xa0"]


def _check(source: DataSource, good: list[int], bad: list[int], screen: _Screen, *, tables: bool) -> None:
    report = check([source])
    assert (report.rows, [problem.line for problem in report.problems]) == (len(good), bad)
    if tables:
        show_report(screen.console, report)
    else:
        show_problems(screen.console, report.problems)
    report_as_json(report).encode()


def _convert(path: str, out: Path, good: list[int], problems: list[RowProblem], screen: _Screen) -> None:
    target = out / "rows.jsonl"
    damaged = any(isinstance(problem, FileProblem) for problem in problems)
    if damaged:
        with pytest.raises(DataError, match="nothing was written"):
            convert_file("ranked", path, target, max_line_mb=LIMIT_MB)
        assert not list(out.glob("*"))

    def convert() -> Conversion:
        return convert_file("ranked", path, target, max_line_mb=LIMIT_MB, keep_readable=damaged)

    if not good:
        with pytest.raises(PolarError, match="none of its") as caught:
            convert()
        screen.print(str(caught.value), markup=False)
        return
    done = convert()
    assert done.problems == problems
    show_problems(screen.console, done.problems)
    again = list(read_rows(target))
    assert not [row for _, row in again if isinstance(row, RowProblem)]
    assert len(again) >= len(good) - done.without_pairs


def _split(source: DataSource, out: Path, good: list[int], bad: list[int]) -> None:
    def split() -> int:
        sides = split_by_prompt([source], out / "a.jsonl", out / "b.jsonl", fraction=0.5)
        return sum(side.rows for side in sides)

    if bad:
        with pytest.raises(DataError):
            split()
        assert not list(out.glob("*"))
    else:
        assert split() == len(good)


def _preview(source: DataSource, template: PolarTemplate, screen: _Screen) -> None:
    for index, (_, row) in enumerate(source.rows()):
        if index > 3:
            break
        try:
            example = read_example(source, index)
        except DataError as error:
            screen.print(str(error), markup=False)
            continue
        assert not isinstance(row, RowProblem)
        for run in token_runs(example, template)[1]:
            screen.print(run.title, markup=False)
            screen.print(run_text(run))


def test_ids_of_a_folder_can_be_found_again(tmp_path: Path) -> None:
    for name in ("a/rows.jsonl", "b/rows.jsonl"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        (tmp_path / "in" / name).write_bytes(GOOD + b"\n\n" + END)
    convert_file("ranked", str(tmp_path / "in"), tmp_path / "out.jsonl")
    ids = [row["id"] for _, row in read_rows(tmp_path / "out.jsonl") if isinstance(row, dict)]
    assert ids == ["a/rows.jsonl:1", "a/rows.jsonl:3", "b/rows.jsonl:1", "b/rows.jsonl:3"]
    assert check([DataSource(path=str(tmp_path / "out.jsonl"))]).repeated_ids == 0
