"""The conversion of a file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polar_ft.data.converters.catalogue import CONVERTERS
from polar_ft.data.converters.mapping import mapped
from polar_ft.data.converters.recognise import reads, recognise
from polar_ft.data.problems import FileProblem
from polar_ft.data.reading import (
    MAX_LINE_MB,
    OnBytes,
    RowProblem,
    expand,
    place_below,
    raise_problems,
    read_rows,
)
from polar_ft.data.records import RowError, parse_row
from polar_ft.data.report import many
from polar_ft.data.writing import open_rows
from polar_ft.errors import PolarError


@dataclass
class Conversion:
    """Counts of a conversion.

    Attributes:
        rows_in: Rows that were read.
        prompts_in: Prompts that they have, if the format gathers the rows of a prompt.
        pairs: Pair rows that were written.
        ranked: Ranked rows that were written.
        left_out: Number of pairs that were dropped, by reason.
        without_pairs: Rows (prompts, if the format gathers the rows of a prompt) that gave nothing because
            all their pairs were dropped.
        guessed: Rows that do not say where their prompt ends: it is what chosen and rejected begin with.
        problems: Rows and files that could not be used; of a prompt that could not be used, its first row.
        unusable: Rows that could not be used, all rows of such a prompt among them.
    """

    rows_in: int = 0
    prompts_in: int | None = None
    pairs: int = 0
    ranked: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    without_pairs: int = 0
    guessed: int = 0
    problems: list[RowProblem] = field(default_factory=list)
    unusable: int = 0

    @property
    def damaged(self) -> list[RowProblem]:
        """The problems of files that cannot be read, or not to their end."""
        return [problem for problem in self.problems if isinstance(problem, FileProblem)]


def convert_file(
    name: str,
    source: str,
    target: Path,
    *,
    split: str | None = None,
    max_line_mb: float = MAX_LINE_MB,
    options: Mapping[str, Any] | None = None,
    mapping: Mapping[str, str] | None = None,
    strict: bool = False,
    keep_readable: bool = False,
    on_bytes: OnBytes | None = None,
) -> Conversion:
    """Converts a file; rows that cannot be used are dropped and named in the result.

    The id of a row without one is its place in the source, so that it can be found again.

    Args:
        name: A key of `CONVERTERS`.
        source: The data; see `polar_ft.data.reading.DataSource.path`. Sub-folders of a folder are read too.
        target: The .jsonl or .jsonl.gz file to write; replaced if it exists.
        split: Split of a HuggingFace data set; None for that of the format.
        max_line_mb: Longest line that is read, in 2**20 bytes.
        options: Keyword arguments of the converter.
        mapping: Names of fields, as the converter expects them and as the source has them; see `mapped`.
        strict: Write nothing if a row cannot be used.
        keep_readable: Write what can be read although a file is damaged.
        on_bytes: See `read_rows`.

    Raises:
        DataError: A row cannot be used, and ``strict`` is set; or a file cannot be read, or not to its end.
        PolarError: There is no such converter, option or file, or no row could be used; nothing is written.
    """
    if name not in CONVERTERS:
        raise PolarError(f"{name}: no such format; there are auto, {', '.join(sorted(CONVERTERS))}")
    fmt, options = CONVERTERS[name], options or {}
    for option, value in options.items():
        if option not in fmt.options:
            has = f"; it has {', '.join(f'--{known}' for known in fmt.options)}" if fmt.options else ""
            raise PolarError(f"--{option} is no option of the format {name}{has}; leave it out")
        choices = fmt.choices(option)
        if choices and value not in choices:
            raise PolarError(f"--{option} {value}: the format {name} has {', '.join(choices)}")

    done, first = Conversion(), None

    def read() -> Iterator[tuple[str, dict[str, Any]]]:
        nonlocal first
        for file in expand(source, recursive=True):
            for place, row in read_rows(file, split or fmt.split, max_line_mb=max_line_mb, on_bytes=on_bytes):
                done.rows_in += not isinstance(row, FileProblem)
                try:
                    if mapping and not isinstance(row, RowProblem):
                        row = mapped(row, mapping)
                except RowError as error:
                    row = RowProblem.at(place, error)
                if isinstance(row, RowProblem):
                    done.problems.append(row)
                    done.unusable += not isinstance(row, FileProblem)
                else:
                    first = first or (place, row)
                    yield place, row

    folder = source if os.path.isdir(source) else None
    units: Iterator[tuple[str, Any]] = read()
    if fmt.gather is not None:
        units = _gathered(units, fmt.gather, done)
    with open_rows(target) as out:
        for place, unit in units:
            try:
                converted = fmt.convert(unit, **{**fmt.options_at(place), **options})
                rows = _named(folder, place, converted.rows)
                for row in rows:
                    parse_row(row)
            except RowError as error:
                done.problems.append(RowProblem.at(place, error))
                done.unusable += 1 if fmt.gather is None else len(unit)
                continue
            done.left_out.update(converted.left_out)
            done.without_pairs += not rows
            done.guessed += converted.guessed
            for row in rows:
                out.write(row)
                done.ranked += "responses" in row
                done.pairs += "responses" not in row
        if strict:
            raise_problems(done.problems)
        if done.damaged and not keep_readable:
            readable = f"{done.rows_in:,} row{'' if done.rows_in == 1 else 's'} could be read"
            more = f"; {readable}, and --keep-readable converts them" if done.rows_in else ""
            advice = f"nothing was written{more}"
            raise_problems(done.damaged, advice)
        if not out.count:
            raise PolarError(_why_nothing(name, source, done, first))
    return done


def _gathered(
    rows: Iterator[tuple[str, dict[str, Any]]],
    key: Callable[[Mapping[str, Any]], Hashable],
    done: Conversion,
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Gathers the rows of each key: yields the place of the first row, and all rows, by first appearance."""
    groups: dict[Hashable, tuple[str, list[dict[str, Any]]]] = {}
    for place, row in rows:
        try:
            groups.setdefault(key(row), (place, []))[1].append(row)
        except RowError as error:
            done.problems.append(RowProblem.at(place, error))
            done.unusable += 1
    done.prompts_in = len(groups)
    yield from groups.values()


def _named(folder: str | None, place: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sets the id of rows without one to their place below the folder that is converted."""
    named = []
    for number, row in enumerate(rows, start=1):
        if row.get("id") is None:
            at = place_below(folder, place)
            name = at if len(rows) == 1 else f"{at}-{number}"
            row = {"id": name} | {key: value for key, value in row.items() if key != "id"}
        named.append(row)
    return named


def _why_nothing(
    name: str, source: str, done: Conversion, first: tuple[str, Mapping[str, Any]] | None
) -> str:
    reasons = [f"{done.unusable:,} cannot be used"] if done.unusable else []
    unit = "row" if done.prompts_in is None else "prompt"
    reasons += [f"of {many(done.without_pairs, unit)} no pair was left"] if done.without_pairs else []
    message = f"{source}: none of its {done.rows_in:,} rows gives a pair as {name} ({', '.join(reasons)})"
    if done.problems:
        message += f"; the first: {done.problems[0]}"
    found = None if first is None or reads(CONVERTERS[name], *first) else recognise(CONVERTERS, [first])
    if found is not None:
        message += f" — this looks like {' or '.join((found.name, *found.same, *found.undecided))}"
    return message
