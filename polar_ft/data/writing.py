"""Writes JSON lines atomically: no incomplete file is left behind."""

from __future__ import annotations

import gzip
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from polar_ft.errors import PolarError
from polar_ft.files import unfinished


class RowWriter:
    """Writes rows as JSON lines; made by `open_rows`.

    Attributes:
        count: Rows written so far.
    """

    def __init__(self, path: Path, stream: Any, is_list: bool = False) -> None:
        self.count = 0
        self._is_list = is_list
        self._path = path
        self._stream = stream

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes one row.

        Raises:
            PolarError: The disk is full or fails.
        """
        line = to_line(row)
        if self._is_list:
            line = (b",\n" if self.count else b"[\n") + line.rstrip(b"\n")
        with _disk_errors(self._path):
            self._stream.write(line)
        self.count += 1


def to_line(row: Mapping[str, Any]) -> bytes:
    r"""Makes one line of JSON without escaping readable text.

    What JSON lacks becomes a string (dates) or null (NaN and infinity).

    >>> to_line({"prompt": "¿Qué?", "score": float("nan")}).decode()
    '{"prompt": "¿Qué?", "score": null}\n'
    """
    try:
        text = json.dumps(row, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        row = _finite(row)
        text = json.dumps(row, ensure_ascii=False, default=str)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, in a field that is not checked
        return json.dumps(row, default=str).encode() + b"\n"


def _finite(value: Any) -> Any:
    """The value with null in place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def refuse_to_overwrite(
    paths: Iterable[Path], *, force: bool, suffixes: tuple[str, ...] = (".jsonl", ".jsonl.gz")
) -> None:
    """Checks that outputs may be written; called before any work is done.

    Raises:
        PolarError: An output exists and ``force`` was not given, its name has none of the suffixes, or
            nothing can be written to its folder.
    """
    for path in paths:
        if not path.name.endswith(suffixes):
            kind = "a JSON list" if suffixes == (".json",) else "JSON lines"
            raise PolarError(
                f"{path}: rows are written as {kind}; the name must end in {' or '.join(suffixes)}"
            )
        if path.is_dir():
            raise PolarError(f"{path}: is a folder; name a file")
        if path.exists() and not force:
            raise PolarError(f"{path}: exists already; choose another name, or --force to replace it")
        # Tried, as permissions alone do not say it: file systems are read-only, full or virtual.
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise PolarError(
                f"{path}: cannot be written ({folder}: {error.strerror or error}); name another output"
            ) from error


@contextmanager
def open_rows(path: Path) -> Iterator[RowWriter]:
    """Opens a file of rows for writing; it appears, complete, if the block succeeds.

    Args:
        path: A .jsonl or .jsonl.gz file, or a .json file for one list of all rows; its folder is created
            where it is missing.

    Raises:
        PolarError: The file cannot be written.
    """
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(path) as part:
        with _disk_errors(path):
            raw = part.open("wb")
        # A gzip file without a time stamp, so that the same rows give the same bytes.
        stream = gzip.GzipFile(path.name, "wb", fileobj=raw, mtime=0) if path.name.endswith(".gz") else raw
        try:
            is_list = path.name.endswith(".json")
            writer = RowWriter(path, stream, is_list)
            yield writer
            with _disk_errors(path):
                if is_list:
                    stream.write(b"\n]\n" if writer.count else b"[]\n")
                if stream is not raw:
                    stream.close()
                raw.flush()
                os.fsync(raw.fileno())
        finally:
            with suppress(OSError):  # closing flushes again, and the disk may be full
                raw.close()


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise PolarError(
            f"{path}: cannot be written ({reason}); no incomplete file was left behind. Free some space, or "
            f"choose another place"
        ) from error
