"""Rows and files that cannot be used: how they are named, and what a file looks like that is no data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from polar_ft.data.records import RowError
from polar_ft.errors import DataError, printable

PROBLEMS_SHOWN = 20


@dataclass(frozen=True)
class RowProblem:
    """A row that cannot be used.

    >>> print(RowProblem("pairs.jsonl", 3, "chosen", "is missing — add it"))
    pairs.jsonl:3: chosen: is missing — add it

    Attributes:
        file: The file or data set, as the user named it.
        line: Line in the file, or row of a list, Parquet file or data set, from 1; 0 for the file itself.
        field: The field of the row; empty for the row itself.
        reason: What is wrong and what to do.
    """

    file: str
    line: int
    field: str
    reason: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        parts = (place, self.field, self.reason)
        return printable(": ".join(part for part in parts if part)).replace("\n", "\\n")

    @classmethod
    def at(cls, source: str, error: RowError) -> RowProblem:
        """Makes the problem of an error in a row whose source is "file:line"."""
        file, _, line = source.rpartition(":")
        return cls(file, int(line), error.field, error.reason)


@dataclass(frozen=True)
class FileProblem(RowProblem):
    """A file that cannot be read, or not from this line on: its other rows are unknown."""


def raise_problems(problems: Sequence[RowProblem], advice: str = "") -> None:
    """Raises a `DataError` that names the first problems and counts all of them, if there are any.

    Args:
        problems: The problems.
        advice: A last line of the message.
    """
    if not problems:
        return
    shown = "\n".join(f"  {problem}" for problem in problems[:PROBLEMS_SHOWN])
    rest = len(problems) - PROBLEMS_SHOWN
    more = f"\n  … and {rest:,} more; `polar-ft data check --json` lists them all" if rest > 0 else ""
    last = f"\n{advice}" if advice else ""
    files = sum(isinstance(problem, FileProblem) for problem in problems)
    counts = [(len(problems) - files, "row"), (files, "file")]
    what = " and ".join(f"{count:,} {thing}{'s' * (count > 1)}" for count, thing in counts if count)
    raise DataError(f"{what} cannot be used:\n{shown}{more}{last}", problems)


def not_utf8(text: bytes, at: int, unit: str = "line") -> str:
    r"""Says which byte of a line (or another unit) is no UTF-8, and from which encoding to convert.

    >>> not_utf8("café".encode("latin-1"), 3)[50:]
    'save the file as UTF-8 (iconv -f WINDOWS-1252 -t UTF-8)'
    """
    encoding = _encoding(text)
    how = (
        f"save the file as UTF-8 (iconv -f {encoding} -t UTF-8)"
        if encoding
        else "correct it (all else is UTF-8)"
    )
    return f"is not valid UTF-8 (0x{text[at]:02x} at byte {at + 1} of the {unit}) — {how}"


def _encoding(text: bytes) -> str | None:
    """Guesses the encoding of text that is no UTF-8; None if it is UTF-8 in which bytes are damaged."""
    decoded = text.decode(errors="surrogateescape")
    wrong = len(re.findall("[\udc80-\udcff]", decoded))
    if wrong <= len(re.findall("[^\x00-\x7f\udc80-\udcff]", decoded)):
        return None
    high = [byte for byte in text if byte > 0x7F]
    runs = re.findall(rb"[\x80-\xff]+", text)
    if len(high) < 2 * len(runs):  # single letters between those of ASCII
        return "WINDOWS-1252"
    if sum(byte >= 0xC0 for byte in high) > 0.95 * len(high):  # where Cyrillic has its letters
        return "WINDOWS-1251"
    kana = sum(byte in (0x81, 0x82, 0x83) for byte in high)
    return "SHIFT_JIS" if kana > len(high) / 4 else "GB18030"


_MAGIC = (
    (b"version https://git-lfs.github.com/spec/", 'is a Git LFS pointer, not the data — run "git lfs pull"'),
    (b"\x1f\x8b", "is compressed with gzip — its name must end in .gz"),
    (b"PAR1", "is Parquet — its name must end in .parquet"),
    (b"PK\x03\x04", "is a ZIP archive — unpack it (unzip)"),
    (b"BZh", "is compressed with bzip2 — unpack it (bunzip2)"),
    (b"\xfd7zXZ", "is compressed with xz — unpack it (unxz)"),
    (b"\x28\xb5\x2f\xfd", "is compressed with Zstandard — unpack it (unzstd)"),
    (b"\xff\xfe\x00\x00", "is UTF-32 — save it as UTF-8 (iconv -f UTF-32 -t UTF-8)"),
    (b"\x00\x00\xfe\xff", "is UTF-32 — save it as UTF-8 (iconv -f UTF-32 -t UTF-8)"),
    (b"\xff\xfe", "is UTF-16 — save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    (b"\xfe\xff", "is UTF-16 — save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    (b"{\x00", "is UTF-16 — save it as UTF-8 (iconv -f UTF-16LE -t UTF-8)"),
    (b"\x00{", "is UTF-16 — save it as UTF-8 (iconv -f UTF-16BE -t UTF-8)"),
    (b"\x00\x00\x00\x00", "begins with zero bytes — it is damaged; copy it again"),
)
_COLUMNS = {
    "answer",
    "chosen",
    "instruction",
    "output",
    "prompt",
    "question",
    "reference",
    "rejected",
    "response",
}
_LIST_IN_OBJECT = re.compile(
    r'\{\s*"(?!prompt|reference|chosen|rejected|responses|messages|conversations)(\w+)"\s*:\s*\[\s*\{'
)


def no_text(head: bytes) -> str | None:
    """Says what a file is that is no text of rows, from its first bytes; None if it may be."""
    for magic, reason in _MAGIC:
        if head.startswith(magic):
            return reason
    text = head.decode(errors="replace").lstrip("\ufeff \t\r\n")
    if text[:14].lower().startswith(("<!doctype html", "<html")):
        return "is a web page (HTML), not the data — download the file again, logged in if that is needed"
    return None


def no_json(head: bytes) -> str | None:
    r"""Says what a file is that cannot be JSON lines, from its first bytes; None if it may be.

    >>> no_json(b"prompt,chosen,rejected\n2 + 2?,4,5\n")
    'looks like CSV — its name must end in .csv'
    >>> no_json(b'{"prompt": "Hi"}\n')
    """
    if reason := no_text(head):
        return reason
    text = head.decode(errors="replace").lstrip("\ufeff \t\r\n")
    first, ended, _ = text.partition("\n")
    first = first.rstrip()
    for comma, kind in ((",", "CSV"), ("\t", "TSV"), (";", "CSV")) if first[:1] not in "{[" else ():
        if _COLUMNS & {cell.strip().strip('"').lower() for cell in first.split(comma)[:40]}:
            return f"looks like {kind} — its name must end in .{kind.lower()}"
    if ended and first.startswith("{") and first.endswith(("{", "[", ",")):
        rows = _LIST_IN_OBJECT.match(text)
        jq = f".{rows[1]}[]" if rows else "."
        return f"is JSON over several lines — write one object a line (jq -c '{jq}' in.json > out.jsonl)"
    return None
