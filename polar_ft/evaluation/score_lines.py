"""Lines of a file of scores, JSON or CSV, in blocks of many, each with its number for messages."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

from pydantic_core import from_json

from polar_ft.errors import PolarError

CSV_SUFFIXES = (".csv", ".tsv")
JSON_SUFFIXES = (".jsonl", ".json")

_BLOCK = 8192

# Called with line, column ("" for the line as a whole) and what is wrong.
OnProblem = Callable[[int, str, str], None]


@dataclass(frozen=True)
class Block:
    """Some lines of a file.

    Attributes:
        numbers: Of each line in its file, from 1, `[lines]`.
        rows: What each line says, `[lines]`.
    """

    numbers: Sequence[int]
    rows: list[dict[str, Any]]

    @cached_property
    def fields(self) -> set[str]:
        """Every field that a line of the block has."""
        return set(chain.from_iterable(self.rows))

    def values(self, path: str) -> list[Any] | None:
        """The value of a field in each line, None where a line has none; None where no line can have one.

        >>> Block([1, 2], [{"id": "a", "meta": {"n": 1}}, {"id": "b"}]).values("meta.n")
        [1, None]
        """
        if path not in self.fields and path.partition(".")[0] not in self.fields:
            return None
        if path in self.fields:
            try:
                return list(map(itemgetter(path), self.rows))
            except KeyError:
                pass
        return list(map(getter(path), self.rows))


def read_blocks(file: Path, problem: OnProblem) -> Iterator[Block]:
    """Reads a file of JSON lines (.jsonl, .json) or CSV (.csv; .tsv with tabs), also compressed (.gz).

    Args:
        file: The file.
        problem: Called with each line that is no row; it is left out.

    Raises:
        PolarError: The file is of another kind, damaged, or CSV without the two columns of scores.
    """
    name = file.name.removesuffix(".gz")
    if name.endswith(CSV_SUFFIXES):
        lines = _csv_lines(file, "\t" if name.endswith(".tsv") else ",", problem)
        while block := list(islice(lines, _BLOCK)):
            yield Block([number for number, _ in block], [row for _, row in block])
    elif name.endswith(JSON_SUFFIXES):
        yield from _json_blocks(file, problem)
    else:
        kinds = ", ".join((*JSON_SUFFIXES, *CSV_SUFFIXES))
        raise PolarError(f"{file}: cannot read this kind of file; let its name end in {kinds}, also with .gz")


def _json_blocks(file: Path, problem: OnProblem) -> Iterator[Block]:
    with _opened(file) as stream:
        start = 1
        while texts := list(islice(stream, _BLOCK)):
            block = _parse(texts, start, problem)
            if block.rows:
                yield block
            start += len(texts)


def _parse(texts: Sequence[str], start: int, problem: OnProblem) -> Block:
    """Parses lines all at once, which takes half the time, and one by one where that fails, to say which."""
    try:
        rows = from_json(f"[{','.join(texts)}]")
    except (ValueError, RecursionError):
        rows = []
    if len(rows) == len(texts) and set(map(type, rows)) == {dict}:
        return Block(range(start, start + len(rows)), rows)
    numbers, rows = [], []
    for number, text in enumerate(texts, start):
        if text.isspace():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            what = "is a list" if number == 1 and text.lstrip().startswith("[") else f"is not JSON ({error})"
            problem(number, "", f"{what} — write one JSON object a line")
            continue
        if isinstance(row, dict):
            numbers.append(number)
            rows.append(row)
        else:
            problem(number, "", f"is {shown(row)} — write one JSON object a line")
    return Block(numbers, rows)


def _csv_lines(file: Path, delimiter: str, problem: OnProblem) -> Iterator[tuple[int, dict[str, Any]]]:
    with _opened(file) as stream:
        reader = csv.reader(stream, delimiter=delimiter)
        header = next(reader, None)
        if header is None:
            return
        names = [name.strip() for name in header]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise PolarError(f"{file}:1: column {twice[0]!r} stands there twice; rename one of the two")
        for name in ("chosen_score", "rejected_score"):
            if name not in names:
                raise PolarError(
                    f"{file}:1: no column {name!r}; the first line must name the columns, and it has "
                    f"{', '.join(names)[:200]}"
                )
        for cells in _csv_rows(reader, file):
            if not cells:
                continue
            if len(cells) != len(names):
                problem(reader.line_num, "", f"has {len(cells)} cells, the first line {len(names)} columns")
                continue
            row = {name: cell for name, cell in zip(names, cells, strict=True) if cell != ""}
            yield reader.line_num, row


def _csv_rows(reader: Any, file: Path) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise PolarError(f"{file}:{reader.line_num}: is not CSV ({error})") from error


@contextmanager
def _opened(file: Path) -> Iterator[IO[str]]:
    """A text file, also compressed, with or without a byte order mark."""
    opened = gzip.open if file.name.endswith(".gz") else open
    with opened(file, "rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as stream:  # type: ignore[type-var]
        try:
            yield stream
        except UnicodeDecodeError as error:
            raise PolarError(f"{file}: is not valid UTF-8 ({error}); save it as UTF-8") from error
        except (OSError, EOFError) as error:
            raise PolarError(f"{file}: cannot be read ({error}); the file is damaged") from error


def getter(path: str) -> Callable[[Mapping[str, Any]], Any]:
    """Reads a field by its name, or by a path with dots where no field has the whole name.

    >>> getter("meta.source")({"meta": {"source": "wiki"}}), getter("meta.source")({"meta": None})
    ('wiki', None)
    """
    first, *rest = path.split(".")
    if not rest:
        return lambda row: row.get(first)

    def get(row: Mapping[str, Any]) -> Any:
        if path in row:
            return row[path]
        value: Any = row.get(first)
        for key in rest:
            if not isinstance(value, Mapping):
                return None
            value = value.get(key)
        return value

    return get


def shown(value: Any) -> str:
    """A wrong value for a message, short whatever its size."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:39]}…"
