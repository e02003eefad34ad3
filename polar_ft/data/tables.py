"""Reads the rows of tables: CSV, TSV and Excel workbooks; the first line names the columns.

A cell is a text. It becomes something else only where a row needs it: a number or true or false in a column
that is named for one (margin, weight, score, rank, …), and messages or responses where it has them as JSON
(or as Python prints them, which is how pandas writes a column of lists). An empty cell is a missing field;
only an empty reference says that there is none.
"""

from __future__ import annotations

import ast
import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from io import BufferedIOBase
from typing import Any, cast

from polar_ft.data.json_rows import OnBytes, Row
from polar_ft.data.problems import FileProblem, RowProblem, no_text, not_utf8
from polar_ft.errors import PolarError, printable
from polar_ft.files import first_line

SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".xlsx")

_DELIMITERS = (",", ";", "\t")
_HEAD = 2**16
_EXCEL_LONGEST = 32_767
_NUMBERS = re.compile(
    r"(?:^|_)(?:margin|weight|scores?|rank|rating|strength|preference|helpfulness|correctness|coherence"
    r"|complexity|verbosity)(?:_|$)|^(?:is|num|winner)_|^(?:better|safer)_response_id$|^label$",
    re.IGNORECASE,
)
_TRUTH = {"true": True, "false": False}


def read_table(file: str, max_bytes: int, on_bytes: OnBytes | None) -> Iterator[Row]:
    """Reads a table row by row.

    Args:
        file: The file; its name ends in one of `SUFFIXES`.
        max_bytes: Longest row of a CSV file. (A workbook limits a cell to 32,767 characters.)
        on_bytes: Called with the number of bytes on disk read since the last call.

    Yields:
        ("file:line", row) or ("file:line", problem), where "line" is where the row begins.
    """
    return (_read_xlsx if file.lower().endswith(".xlsx") else _read_csv)(file, max_bytes, on_bytes)


def cell_value(column: str, text: str) -> Any:
    """The value of a cell; None if it is missing.

    >>> cell_value("chosen", "4"), cell_value("margin", "0.5"), cell_value("reference", "")
    ('4', 0.5, '')
    >>> cell_value("prompt", '[{"role": "user", "content": "Hi"}]')
    [{'role': 'user', 'content': 'Hi'}]
    """
    if not text.strip():
        return "" if column == "reference" else None
    if _NUMBERS.search(column):
        if text.lower() in _TRUTH:
            return _TRUTH[text.lower()]
        for number in (int, float):
            with suppress(ValueError):
                return number(text)
        return text
    return _decoded(text) if text.lstrip().startswith(("[{", "{")) else text


def _decoded(text: str) -> Any:
    """The messages or responses that a text has as JSON; any other text stays as it is."""
    try:
        value = json.loads(text)
    except ValueError:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return text
    except RecursionError:
        return text
    entries = value if isinstance(value, list) else [value]
    ours = all(isinstance(entry, dict) and _is_message(entry.keys()) for entry in entries)
    return value if ours else text


def _is_message(keys: Any) -> bool:
    spellings = ({"role", "content"}, {"from", "value"}, {"content", "score"}, {"content", "rank"})
    return any(spelling <= keys for spelling in spellings)


def _row(columns: Sequence[str], cells: Sequence[str]) -> dict[str, Any] | str:
    """The row of some cells, or what is wrong with it."""
    more = [cell for cell in cells[len(columns) :] if cell.strip()]
    if more or len(cells) < len(columns):
        return (
            f"has {len(cells)} cells, but there are {len(columns)} columns ({', '.join(columns[:8])}) — a "
            'text with a delimiter or a line break belongs in quotes ("…"), and a quote in it is doubled'
        )
    values = {column: cell_value(column, cell) for column, cell in zip(columns, cells, strict=False)}
    return {column: value for column, value in values.items() if value is not None}


def _columns(cells: Sequence[str]) -> list[str] | str:
    """The names of the columns, or what is wrong with them; a column without a name gets a number."""
    names = [cell.strip() for cell in cells]
    while names and not names[-1]:
        names.pop()
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        return f"has the column {twice[0]!r} twice — rename one of them"
    if len(names) < 2:
        return (
            "does not begin with a line of two or more names of columns, with a comma, a semicolon or a tab "
            "between them — write one"
        )
    return [name or f"column_{number}" for number, name in enumerate(names, start=1)]


class _TooLongError(Exception):
    """A row of a CSV file is longer than what is read."""


class _Lines:
    """The lines of a CSV file as text, for `csv.reader`; counts what belongs to the row that is being read.

    Bytes that are no UTF-8 become halves of surrogate pairs, so that only their row is lost.

    Attributes:
        number: Lines read so far.
        wrong: What is no UTF-8 in the row that is being read.
    """

    def __init__(self, stream: BufferedIOBase, max_bytes: int) -> None:
        self.number = 0
        self.wrong: str | None = None
        self._stream = stream
        self._max_bytes = self._left = max_bytes

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(self._left + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self._left -= len(line)
        if self._left < 0:
            raise _TooLongError
        if self.number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            self.wrong = self.wrong or not_utf8(line, error.start)
            return line.decode(errors="replace")

    def next_row(self) -> None:
        """Begins a row."""
        self._left, self.wrong = self._max_bytes, None


def _read_csv(file: str, max_bytes: int, on_bytes: OnBytes | None) -> Iterator[Row]:
    name = printable(file)
    start = reported = 0
    # The limit of the csv module is one for the whole process; that of `_Lines` is exact.
    csv.field_size_limit(max(csv.field_size_limit(), max_bytes))
    try:
        with (
            open(file, "rb") as raw,
            gzip.open(raw) if file.lower().endswith(".gz") else nullcontext(raw) as s,
        ):
            stream = cast(BufferedIOBase, s)
            head = stream.read(_HEAD)
            stream.seek(0)
            if reason := no_text(head):
                yield f"{name}:0", FileProblem(name, 0, "", reason)
                return
            lines = _Lines(stream, max_bytes)
            reader = csv.reader(lines, delimiter=_delimiter(head), strict=True)
            columns: list[str] | str = []
            while True:
                lines.next_row()
                start = lines.number + 1
                cells = next(reader, None)
                if on_bytes is not None and (cells is None or start % 64 == 0):
                    on_bytes(raw.tell() - reported)
                    reported = raw.tell()
                if cells is None:
                    return
                if not any(cell.strip() for cell in cells):
                    continue
                if lines.wrong is not None:
                    yield f"{name}:{start}", RowProblem(name, start, "", lines.wrong)
                elif not columns:
                    columns = _columns(cells)
                    if isinstance(columns, str):
                        yield f"{name}:{start}", FileProblem(name, start, "", columns)
                        return
                else:
                    row = _row(cast("list[str]", columns), cells)
                    yield f"{name}:{start}", RowProblem(name, start, "", row) if isinstance(row, str) else row
    except _TooLongError:
        reason = (
            f"the row is over the limit of {max_bytes / 2**20:.3g} MB — a quote in it may not be closed; "
            "else raise max_line_mb (--max-line-mb). The rest of the file was not read"
        )
        yield f"{name}:{start}", FileProblem(name, start, "", reason)
    except csv.Error as error:
        reason = (
            f"is not CSV ({error}) — a text with a quote belongs in quotes, and the quotes in it are written "
            "twice; the rest of the file was not read"
        )
        yield f"{name}:{start}", FileProblem(name, start, "", reason)
    except (OSError, EOFError, zlib.error) as error:
        reason = f"cannot be read further ({error}) — the file is damaged; copy it again"
        yield f"{name}:{start}", FileProblem(name, start, "", reason)


def _delimiter(head: bytes) -> str:
    """The delimiter by which the first rows have the most columns, all of them as many."""

    def columns(delimiter: str) -> tuple[int, int]:
        text = head.decode("utf-8-sig", errors="replace")
        counts = []
        try:
            for cells in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter):
                counts.append(len(cells))
                if len(counts) == 20:
                    break
        except csv.Error:
            return 0, 0
        if not counts or counts[0] < 2:
            return 0, 0
        return sum(count == counts[0] for count in counts), counts[0]

    return max(_DELIMITERS, key=columns)


def _read_xlsx(file: str, max_bytes: int, on_bytes: OnBytes | None) -> Iterator[Row]:
    try:
        import openpyxl
    except ImportError as error:
        raise PolarError(f"{file}: reading Excel workbooks needs openpyxl: pip install openpyxl") from error
    name, number = printable(file), 0
    try:
        book = openpyxl.load_workbook(file, read_only=True, data_only=True)
        try:
            sheets = [sheet for sheet in book.worksheets if _has_rows(sheet)]
            if len(sheets) != 1:
                titles = ", ".join(sheet.title for sheet in sheets)
                has = f"has rows in several sheets ({titles})" if sheets else "has no rows"
                yield f"{name}:0", FileProblem(name, 0, "", f"{has} — save the one that is meant as a file")
                return
            columns: list[str] | str = []
            for number, cells in enumerate(sheets[0].iter_rows(), start=1):
                texts = [_excel_text(cell) for cell in cells]
                if not any(isinstance(text, str) and text.strip() for text in texts) and None not in texts:
                    continue
                wrong = _wrong_cell(cells, texts)
                if not columns:
                    columns = _columns([text or "" for text in texts])
                    if isinstance(columns, str):
                        yield f"{name}:{number}", FileProblem(name, number, "", columns)
                        return
                    continue
                row = wrong or _row(cast("list[str]", columns), [text or "" for text in texts])
                yield f"{name}:{number}", RowProblem(name, number, "", row) if isinstance(row, str) else row
        finally:
            book.close()
        if on_bytes is not None:
            on_bytes(os.path.getsize(file))
    except Exception as error:  # of the archive or its XML, which openpyxl does not wrap
        reason = f"is not a readable Excel workbook ({first_line(error, 160)}) — save it again, or as CSV"
        yield f"{name}:{number}", FileProblem(name, number, "", reason)


def _has_rows(sheet: Any) -> bool:
    return any(cell.value is not None for cells in sheet.iter_rows() for cell in cells)


def _excel_text(cell: Any) -> str | None:
    """The text of a cell; None if it cannot be used, see `_wrong_cell`."""
    from openpyxl.utils.escape import unescape

    value = cell.value
    if value is None:
        return ""
    if getattr(cell, "data_type", None) == "e":
        return None
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = str(value)
    if len(text) >= _EXCEL_LONGEST:
        return None
    return unescape(text).replace("\r\n", "\n") if "_x" in text else text


def _wrong_cell(cells: Sequence[Any], texts: Sequence[str | None]) -> str | None:
    for cell, text in zip(cells, texts, strict=True):
        if text is None and getattr(cell, "data_type", None) == "e":
            return f"the cell {cell.coordinate} is the error {cell.value} — correct the formula"
        if text is None:
            return (
                f"the cell {cell.coordinate} has {_EXCEL_LONGEST:,} characters, where Excel cuts texts off — "
                "use CSV or JSON lines for longer ones"
            )
    return None
