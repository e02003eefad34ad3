"""Reads rows one at a time from JSON lines or lists, gzip, Parquet, folders and HuggingFace data sets.

Memory does not grow with the size of a file. A row that cannot be read does not end the reading; it is
returned as a `RowProblem`, so that one pass names everything that is wrong.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Protocol, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from polar_ft.data.json_list import BrokenListError, entries
from polar_ft.data.records import Example, Pairing, RowError, parse_row
from polar_ft.errors import DataError, PolarError, validation_sentences
from polar_ft.files import first_line

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
MAX_LINE_MB = 32.0
PROBLEMS_SHOWN = 20

Row = tuple[str, "dict[str, Any] | RowProblem"]
OnBytes = Callable[[int], None]


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
        return ": ".join(part for part in (place, self.field, self.reason) if part)

    @classmethod
    def at(cls, source: str, error: RowError) -> RowProblem:
        """Makes the problem of an error in a row whose source is "file:line"."""
        file, _, line = source.rpartition(":")
        return cls(file, int(line), error.field, error.reason)


class DataSource(BaseModel):
    """One file, folder or data set of a config.

    Attributes:
        path: A .jsonl, .jsonl.gz or .parquet file, a folder of such files, or a HuggingFace data-set id
            (``owner/name``, or ``owner/name:config``).
        weight: Multiplies the weight of every pair.
        max_samples: Number of rows to use, from the first one; None uses all.
        split: Split of a HuggingFace data set.
        pairing: How ranked rows become pairs.
        subset: Subset of rows that do not name one themselves.
        max_line_mb: Longest line of JSON in 2**20 bytes; a longer one is skipped and is a problem.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    path: str
    weight: float = Field(default=1.0, gt=0)
    max_samples: int | None = Field(default=None, ge=1)
    split: str = "train"
    pairing: Pairing = "adjacent"
    subset: str | None = None
    max_line_mb: float = Field(default=MAX_LINE_MB, gt=0)

    def rows(self, on_bytes: OnBytes | None = None) -> Iterator[Row]:
        """Reads all rows, without regard to ``max_samples``; see `read_rows`."""
        return read_rows(self.path, self.split, max_line_mb=self.max_line_mb, on_bytes=on_bytes)


Sources = str | os.PathLike[str] | Mapping[str, Any] | DataSource | Sequence[Any]


def as_sources(sources: Sources) -> list[DataSource]:
    """Converts the data of a config to a list of `DataSource`.

    Args:
        sources: A path, a dict of `DataSource` fields, a `DataSource`, or a list of those.

    Raises:
        PolarError: A field is unknown or has a wrong value.

    >>> [source.weight for source in as_sources(["a.jsonl", {"path": "b.jsonl", "weight": 0.5}])]
    [1.0, 0.5]
    """
    if isinstance(sources, DataSource):
        return [sources]
    if isinstance(sources, (str, os.PathLike)):
        return [DataSource(path=os.fspath(sources))]
    if isinstance(sources, Mapping):
        fields = {key: os.fspath(v) if isinstance(v, os.PathLike) else v for key, v in sources.items()}
        try:
            return [DataSource(**fields)]
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            unknown = first["type"] == "extra_forbidden"
            what = f"unknown key {first['loc'][0]!r}" if unknown else validation_sentences(error)[0]
            known = ", ".join(DataSource.model_fields)
            raise PolarError(f"data source {fields}: {what}; it may say {known}") from None
    if not isinstance(sources, Sequence) or not sources:
        raise PolarError(f"data sources: {sources!r} names no file; give a path or a list of paths")
    return [source for entry in sources for source in as_sources(entry)]


def expand(path: str, *, recursive: bool = False) -> list[str]:
    """Lists the files of a path: the path itself, the data files of a folder in order, or a HuggingFace id.

    Args:
        path: See `DataSource.path`.
        recursive: Include the files of sub-folders, except hidden ones.

    Raises:
        PolarError: The file does not exist, or is of a kind that cannot be read.
    """
    if os.path.isdir(path):
        folder = Path(path)
        found = folder.rglob("*") if recursive else folder.iterdir()
        files = sorted(
            str(file)
            for file in found
            if file.name.endswith(SUFFIXES)
            and not (recursive and any(part.startswith(".") for part in file.relative_to(folder).parts))
        )
        if not files:
            raise PolarError(f"{path}: no data in this folder; it needs files that end in {_kinds()}")
        return files
    if os.path.exists(path):
        if not path.endswith(SUFFIXES):
            raise PolarError(f"{path}: cannot read this kind of file; it must end in {_kinds()}")
        return [path]
    # A data-set id looks like a path; a path in an existing folder is meant as a file.
    in_folder = "/" in path and Path(path).parent.is_dir()
    if path.endswith(SUFFIXES) or in_folder or not _DATASET_ID.fullmatch(path):
        raise PolarError(f"{path}: no such file; check the spelling of the path")
    return [path]


def _kinds() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


_DATASET_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")


def size_in_bytes(path: str) -> int | None:
    """Number of bytes to read, for a progress bar; None for a HuggingFace data set, where it is unknown."""
    files = expand(path)
    return sum(map(os.path.getsize, files)) if all(map(os.path.exists, files)) else None


def read_rows(
    path: str | os.PathLike[str],
    split: str = "train",
    *,
    max_line_mb: float = MAX_LINE_MB,
    on_bytes: OnBytes | None = None,
) -> Iterator[Row]:
    """Reads the rows of a file, a folder or a HuggingFace data set, without checking their fields.

    Args:
        path: See `DataSource.path`.
        split: Split of a HuggingFace data set.
        max_line_mb: Longest line of JSON in 2**20 bytes; a longer one is a problem and is not kept in memory.
        on_bytes: Called repeatedly with the number of bytes (as on disk) read since the last call.

    Yields:
        ("file:line", row) or ("file:line", problem); ("file:0", problem) for a file without any row.

    Raises:
        PolarError: There is no such file or data set.
    """
    for file in expand(os.fspath(path)):
        if not os.path.exists(file):
            rows = _read_dataset(file, split)
        elif file.endswith(".parquet"):
            rows = _read_parquet(file, on_bytes)
        elif file.endswith((".json", ".json.gz")) and _is_list(file):
            rows = _read_json_list(file, int(max_line_mb * 2**20), on_bytes)
        else:
            rows = _read_json_lines(file, int(max_line_mb * 2**20), on_bytes)
        empty = True
        for row in rows:
            empty = False
            yield row
        if empty:
            yield (
                f"{file}:0",
                RowProblem(file, 0, "", "has no rows — an empty file is not data; check the path"),
            )


def read_examples(
    sources: Sources,
    *,
    pairing: Pairing | None = None,
    on_problem: Literal["raise"] | Callable[[RowProblem], None] = "raise",
    on_bytes: OnBytes | None = None,
) -> Iterator[Example]:
    """Reads rows, checks them and returns them as `Example`.

    A ranked row in which all compared responses are tied yields an `Example` without pairs, so that it is
    counted.

    Args:
        sources: What `as_sources` takes.
        pairing: Overrides every source's own ``pairing``.
        on_problem: How to handle rows that cannot be used: "raise" reads to the end, so that all of them are
            known, then raises; a function is called with each of them.
        on_bytes: See `read_rows`.

    Raises:
        DataError: There were problems and ``on_problem="raise"``; the message shows the first 20.
        PolarError: A file or data set does not exist; raised before anything is read.
    """
    checked = as_sources(sources)
    for source in checked:
        expand(source.path)
    return _read_examples(checked, pairing, on_problem, on_bytes)


def _read_examples(
    sources: Iterable[DataSource],
    pairing: Pairing | None,
    on_problem: Literal["raise"] | Callable[[RowProblem], None],
    on_bytes: OnBytes | None,
) -> Iterator[Example]:
    problems: list[RowProblem] = []
    report = problems.append if on_problem == "raise" else on_problem
    for source in sources:
        for count, (place, row) in enumerate(source.rows(on_bytes)):
            if count == source.max_samples:
                break
            if isinstance(row, RowProblem):
                report(row)
                continue
            if source.subset is not None and row.get("subset") is None:
                row["subset"] = source.subset
            try:
                checked = parse_row(row)
            except RowError as error:
                report(RowProblem.at(place, error))
                continue
            if not problems:
                yield checked.to_example(place, pairing=pairing or source.pairing, weight=source.weight)
    raise_problems(problems)


def raise_problems(problems: Sequence[RowProblem]) -> None:
    """Raises a `DataError` that names the first problems and counts all of them, if there are any."""
    if not problems:
        return
    shown = "\n".join(f"  {problem}" for problem in problems[:PROBLEMS_SHOWN])
    rest = len(problems) - PROBLEMS_SHOWN
    more = f"\n  … and {rest:,} more; `polar-ft data check` lists them all" if rest > 0 else ""
    rows = "1 row" if len(problems) == 1 else f"{len(problems):,} rows"
    raise DataError(f"{rows} cannot be used:\n{shown}{more}", problems)


def _read_json_lines(file: str, max_bytes: int, on_bytes: OnBytes | None) -> Iterator[Row]:
    with open(file, "rb") as raw, gzip.open(raw) if file.endswith(".gz") else nullcontext(raw) as stream:
        lines = _lines(stream, max_bytes)
        number = reported = 0
        while True:
            number += 1
            try:
                line = next(lines, None)
            except (OSError, EOFError, zlib.error) as error:
                reason = f"cannot be read further ({error}) — the file is damaged; copy it again"
                yield f"{file}:{number}", RowProblem(file, number, "", reason)
                return
            if on_bytes is not None and (line is None or number % 64 == 0):
                # Bytes on disk, whose total is known, not bytes after decompression.
                position = raw.tell()
                on_bytes(position - reported)
                reported = position
            if line is None:
                return
            if isinstance(line, int):
                sizes = f"{line / 2**20:.1f} MB, the limit {max_bytes / 2**20:g} MB"
                reason = f"the line is {sizes} — split it, or raise max_line_mb (--max-line-mb)"
                yield f"{file}:{number}", RowProblem(file, number, "", reason)
            elif line.strip():
                yield f"{file}:{number}", _parse_line(file, number, line)


class _ByteLines(Protocol):
    def readline(self, size: int = ..., /) -> bytes: ...


def _lines(stream: _ByteLines, max_bytes: int) -> Iterator[bytes | int]:
    """Reads the lines of a stream; of a line that is too long only its length in bytes."""
    while line := stream.readline(max_bytes + 1):
        if len(line) <= max_bytes or line.endswith(b"\n"):
            yield line
            continue
        length = len(line)
        while not line.endswith(b"\n") and (line := stream.readline(2**20)):
            length += len(line)
        yield length


def _parse_line(file: str, number: int, line: bytes) -> dict[str, Any] | RowProblem:
    def problem(reason: str) -> RowProblem:
        return RowProblem(file, number, "", reason)

    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        byte = f"0x{line[error.start]:02x} at byte {error.start + 1} of the line"
        return problem(f"is not valid UTF-8 ({byte}) — save the file as UTF-8 (iconv -t UTF-8)")
    try:
        row = _parse_json(text)
    except RecursionError:
        return problem("is nested too deeply to be a row — check what wrote the file")
    except ValueError as error:  # JSONDecodeError, or a number with more digits than Python accepts
        if number == 1 and text.lstrip().startswith("["):
            hint = "write one JSON object a line, not one list (jq -c '.[]' in.json > out.jsonl)"
        else:
            hint = "write one JSON object a line"
        detail = (
            f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        )
        return problem(f"is not JSON ({detail}) — {hint}")
    if not isinstance(row, dict):
        return problem(f"is {_kind(row)} — write one JSON object a line")
    return row


def _parse_json(text: str) -> Any:
    # Twice as fast as `json`; where it fails, `json` decides and has better messages.
    try:
        return from_json(text)
    except ValueError:
        return json.loads(text)


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a string", type(None): "null", bool: "true or false"}
    return kinds.get(type(value), "a number")


def _is_list(file: str) -> bool:
    """Whether a file of JSON is one list of rows instead of one row a line."""
    try:
        with open(file, "rb") as raw, gzip.open(raw) if file.endswith(".gz") else nullcontext(raw) as stream:
            return stream.read(256).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    except (OSError, EOFError, zlib.error):
        return False  # reported where the rows are read


def _read_json_list(file: str, max_bytes: int, on_bytes: OnBytes | None) -> Iterator[Row]:
    number, reported = 0, 0
    with open(file, "rb") as raw, gzip.open(raw) if file.endswith(".gz") else nullcontext(raw) as stream:
        text = io.TextIOWrapper(cast(IO[bytes], stream), encoding="utf-8-sig")
        try:
            for number, row in enumerate(entries(text, max_bytes), start=1):
                if on_bytes is not None:
                    position = raw.tell()
                    on_bytes(position - reported)
                    reported = position
                if isinstance(row, dict):
                    yield f"{file}:{number}", row
                else:
                    reason = f"is {_kind(row)} — every entry of the list must be a JSON object"
                    yield f"{file}:{number}", RowProblem(file, number, "", reason)
            return
        except UnicodeDecodeError:
            reason = "is not valid UTF-8 — save the file as UTF-8 (iconv -t UTF-8)"
        except BrokenListError as error:
            reason = f"this entry of the list {error} — the rest of the file is unread"
        except (OSError, EOFError, zlib.error) as error:
            reason = f"cannot be read further ({error}) — the file is damaged; copy it again"
    yield f"{file}:{number + 1}", RowProblem(file, number + 1, "", reason)


def _read_parquet(file: str, on_bytes: OnBytes | None) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise PolarError(f"{file}: reading Parquet needs pyarrow: pip install pyarrow") from error
    number = 0
    try:
        table = parquet.ParquetFile(file)
        size, total = os.path.getsize(file), max(1, table.metadata.num_rows)
        for batch in table.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}:{number}", row
            if on_bytes is not None:
                on_bytes(size * batch.num_rows // total)
    except (pyarrow.ArrowInvalid, OSError) as error:
        reason = first_line(error, 160)
        problem = RowProblem(
            file, number + 1, "", f"is not readable Parquet ({reason}) — write the file again"
        )
        yield f"{file}:{number + 1}", problem


def _read_dataset(name: str, split: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise PolarError(
            f"{name}: no such file, and reading it as a HuggingFace data set needs pip install datasets"
        ) from error
    repository, _, config = name.partition(":")
    try:
        dataset = datasets.load_dataset(repository, config or None, split=split)
    except Exception as error:  # of the hub, the network, or the files of the data set
        reason = first_line(error)
        raise PolarError(
            f"{name}: no such file here, and as a HuggingFace data set (split {split!r}) it could not be "
            f"loaded ({type(error).__name__}: {reason}); check the spelling, the split and the network"
        ) from error
    for number, row in enumerate(dataset, start=1):
        yield f"{name}[{split}]:{number}", dict(row)
