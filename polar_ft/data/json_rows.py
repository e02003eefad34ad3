"""Reads the rows of JSON lines, or of one JSON list, compressed or not; what is damaged is named."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from io import BufferedIOBase
from typing import Any, cast

from polar_ft.data.json_list import DECODER, BadEntry, BrokenListError, RepeatedKeyError, entries
from polar_ft.data.problems import FileProblem, RowProblem, no_json, not_utf8
from polar_ft.errors import printable

OnBytes = Callable[[int], None]
Row = tuple[str, "dict[str, Any] | RowProblem"]

Numbered = tuple[int, "dict[str, Any] | RowProblem | None"]

_HEAD = 4096
# At most so many bytes are read from a compressed file before they are needed.
_READ_AHEAD = 2**17
# One list, or an object that holds it: {"version": "1.1", "data": [...]}.
_IS_LIST = re.compile(
    rb'(?:\xef\xbb\xbf)?\s*(?:\[|\{\s*(?:"[^"\\]*"\s*:\s*(?:"[^"\\]*"|[\w.+-]+)\s*,\s*)*"data"\s*:\s*\[)'
)


def read_json(file: str, max_bytes: int, on_bytes: OnBytes | None) -> Iterator[Row]:
    """Reads a file of JSON lines, or (if its name ends in .json) of one list.

    Args:
        file: The file, with .gz at its end if it is compressed.
        max_bytes: Longest line, or entry of a list in characters.
        on_bytes: Called with the number of bytes on disk read since the last call.
    """
    name, is_gzip = printable(file), file.lower().endswith(".gz")
    number = position = 0

    def report(now: int) -> None:
        # Bytes on disk, whose total is known, not bytes after decompression.
        nonlocal position
        if on_bytes is not None:
            on_bytes(now - position)
        position = now

    try:
        with open(file, "rb") as raw, gzip.open(raw) if is_gzip else nullcontext(raw) as opened:
            stream = cast(BufferedIOBase, opened)
            head = stream.read1(_HEAD)
            stream.seek(0)
            is_list = file.lower().removesuffix(".gz").endswith(".json") and _IS_LIST.match(head)
            if is_gzip and not os.path.getsize(file):
                reason: str | None = "is empty, but a compressed file never is — copy it again"
            else:
                reason = None if is_list else no_json(head)
            if reason:
                yield f"{name}:0", FileProblem(name, 0, "", reason)
                return
            read = _read_list if is_list else _read_lines
            for number, row in read(name, stream, max_bytes):
                if row is not None:
                    yield f"{name}:{number}", row
                if number % 64 == 0:
                    report(raw.tell())
            report(raw.tell())
    except (OSError, EOFError, zlib.error) as error:
        number += 1
        yield (
            f"{name}:{number}",
            FileProblem(name, number, "", _damage(file, error, max(0, position - _READ_AHEAD))),
        )


def _damage(file: str, error: Exception, position: int) -> str:
    if isinstance(error, EOFError):
        return (
            "ends in the middle of its compressed data: how much is missing is not known — the file is "
            "damaged; copy it again"
        )
    if os.path.islink(file) and not os.path.exists(file):
        return f"is a link to {os.readlink(file)}, which does not exist — correct the link"
    if isinstance(error, PermissionError) or os.path.isdir(file):
        return "cannot be read: permission denied — change the permissions (chmod), or leave it out"
    size = os.path.getsize(file) if os.path.exists(file) else position
    return (
        f"cannot be read further ({error}): up to {size - position:,} of {size:,} bytes were not read — the "
        f"file is damaged; copy it again"
    )


def _read_lines(name: str, stream: BufferedIOBase, max_bytes: int) -> Iterator[Numbered]:
    for number, line in enumerate(_lines(stream, max_bytes), start=1):
        if isinstance(line, int):
            sizes = f"{line / 2**20:.1f} MB, the limit {max_bytes / 2**20:g} MB"
            reason = f"the line is {sizes} — split it, or raise max_line_mb (--max-line-mb)"
            yield number, RowProblem(name, number, "", reason)
        elif not line.strip():
            yield number, None
        else:
            row = _parse_line(name, number, line)
            yield number, row
            if isinstance(row, FileProblem):
                return


def _lines(stream: BufferedIOBase, max_bytes: int) -> Iterator[bytes | int]:
    """Reads the lines of a stream; of a line that is too long only its length in bytes."""
    while line := stream.readline(max_bytes + 1):
        if len(line) <= max_bytes or line.endswith(b"\n"):
            yield line
            continue
        length = len(line)
        while not line.endswith(b"\n") and (line := stream.readline(2**20)):
            length += len(line)
        yield length


def _parse_line(name: str, number: int, line: bytes) -> dict[str, Any] | RowProblem:
    def problem(reason: str, *, cut: bool = False) -> RowProblem:
        # Only the last line has no line end: if a value ends nowhere, the file was cut off.
        if cut and not line.endswith(b"\n"):
            reason += (
                f"; the file ends within this line, of which {len(line):,} bytes were not used: copy it again"
            )
            return FileProblem(name, number, "", reason)
        return RowProblem(name, number, "", reason)

    try:
        # Files that were joined have the mark of the beginning in the middle.
        text = line.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        skipped = len(codecs.BOM_UTF8) if line.startswith(codecs.BOM_UTF8) else 0
        return problem(not_utf8(line, error.start + skipped), cut=error.reason == "unexpected end of data")
    try:
        row = DECODER.decode(text)
    except RecursionError:
        return problem("is nested too deeply to be a row — check what wrote the file")
    except RepeatedKeyError as error:
        return problem(str(error))
    except json.JSONDecodeError as error:
        hint, detail = "write one JSON object a line", f"{error.msg}, column {error.colno}"
        if number == 1 and text.lstrip().startswith("["):
            hint += ", not one list (jq -c '.[]' in.json > out.jsonl)"
            return FileProblem(name, number, "", f"is not JSON ({detail}) — {hint}")
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        return problem(f"is not JSON ({detail}) — {hint}", cut=cut)
    except ValueError as error:  # a number with more digits than Python accepts
        return problem(f"is not JSON ({error}) — write one JSON object a line")
    if not isinstance(row, dict):
        return problem(f"is {kind_of(row)} — write one JSON object a line")
    return row


def _read_list(name: str, stream: BufferedIOBase, max_chars: int) -> Iterator[Numbered]:
    number = 0
    try:
        for number, row in enumerate(entries(stream, max_chars), start=1):
            if isinstance(row, dict):
                yield number, row
            elif isinstance(row, BadEntry):
                yield number, RowProblem(name, number, "", row.reason)
            else:
                reason = f"is {kind_of(row)} — every entry of the list must be a JSON object"
                yield number, RowProblem(name, number, "", reason)
    except BrokenListError as error:
        reason = (
            f"this entry of the list {error} — the rest of the file, {error.unread:,} bytes, was not read"
        )
        yield number + 1, FileProblem(name, number + 1, "", reason)


def kind_of(value: Any) -> str:
    """Names the kind of a JSON value that is not an object."""
    kinds = {list: "a list", str: "a string", type(None): "null", bool: "true or false"}
    return kinds.get(type(value), "a number")
