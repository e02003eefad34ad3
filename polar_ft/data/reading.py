"""Reads rows one at a time from JSON lines or lists, gzip, Parquet, folders and HuggingFace data sets.

Memory does not grow with the size of a file. A row that cannot be read does not end the reading; it is
returned as a `RowProblem`, so that one pass names everything that is wrong.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SkipValidation, ValidationError

from polar_ft.data import tables
from polar_ft.data.json_rows import OnBytes, Row, read_json
from polar_ft.data.problems import FileProblem, RowProblem, raise_problems
from polar_ft.data.records import Example, Pairing, RowError, parse_row
from polar_ft.errors import PolarError, printable, validation_sentences
from polar_ft.files import first_line

# In small letters; a name may be written in any.
SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".json", ".json.gz", ".parquet", *tables.SUFFIXES)
MAX_LINE_MB = 32.0


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

    path: Annotated[str, SkipValidation]  # the name of a file need not be UTF-8
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

    A file that several links name is listed once. Hidden files are not listed, nor is what is in hidden
    folders or those that begin with "_" (which Spark and Delta Lake use for themselves).

    Args:
        path: See `DataSource.path`.
        recursive: Include the files of all sub-folders; else only of those that are named like a file of
            data, as Spark and Dask name the folder of a table.

    Raises:
        PolarError: The file does not exist, or is of a kind that cannot be read.
    """
    if os.path.isdir(path):
        files = _files_below(path, recursive)
        if not files:
            raise PolarError(f"{path}: no data in this folder; it needs files that end in {_kinds()}")
        return files
    if os.path.exists(path):
        if not _is_data(path):
            raise PolarError(f"{path}: cannot read this kind of file; it must end in {_kinds()}")
        return [path]
    if os.path.islink(path):
        raise PolarError(f"{path}: is a link to {os.readlink(path)}, which does not exist; correct the link")
    # A data-set id looks like a path; a path in an existing folder is meant as a file.
    in_folder = "/" in path and Path(path).parent.is_dir()
    if _is_data(path) or in_folder or not _DATASET_ID.fullmatch(path):
        raise PolarError(f"{path}: no such file; check the spelling of the path")
    return [path]


def _files_below(folder: str, recursive: bool) -> list[str]:
    files: list[str] = []
    closed: list[str] = []  # what cannot be listed is in the list, so that it is reported where it is read
    known = {_identity(folder)}
    for here, folders, names in os.walk(
        folder, onerror=lambda e: closed.append(e.filename), followlinks=True
    ):
        folders[:] = [
            name
            for name in sorted(folders)
            if not name.startswith((".", "_"))
            and (recursive or here != folder or _is_data(name))
            and _is_new(os.path.join(here, name), known)
        ]
        files += [os.path.join(here, name) for name in names if _is_data(name) and not name.startswith(".")]
    return sorted([*closed, *(file for file in sorted(files) if _is_new(file, known))])


def _is_new(path: str, known: set[tuple[int, int] | str]) -> bool:
    identity = _identity(path)
    new = identity not in known
    known.add(identity)
    return new


def _identity(path: str) -> tuple[int, int] | str:
    """What is the same for all links to a file; the path of a link to nothing."""
    try:
        status = os.stat(path)
    except OSError:
        return path
    return status.st_dev, status.st_ino


def _is_data(path: str) -> bool:
    return path.lower().endswith(SUFFIXES)


def _kinds() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


_DATASET_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")


def size_in_bytes(path: str) -> int | None:
    """Number of bytes to read, for a progress bar; None for a HuggingFace data set, where it is unknown."""
    files = expand(path)
    if not os.path.lexists(files[0]):
        return None
    return sum(os.path.getsize(file) for file in files if os.path.exists(file))


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
        ("file:line", row) or ("file:line", problem); ("file:0", problem) for a file without any row. A
        `FileProblem` says that the rest of a file cannot be read. Names are as `printable` makes them.

    Raises:
        PolarError: There is no such file or data set.
    """
    for file in expand(os.fspath(path)):
        if not os.path.lexists(file):
            rows = _read_dataset(file, split)
        elif file.lower().endswith(".parquet"):
            rows = _read_parquet(file, on_bytes)
        elif file.lower().endswith(tables.SUFFIXES):
            rows = tables.read_table(file, int(max_line_mb * 2**20), on_bytes)
        else:
            rows = read_json(file, int(max_line_mb * 2**20), on_bytes)
        empty = True
        for row in rows:
            empty = False
            yield row
        if empty:
            reason = "has no rows — an empty file is not data; check the path"
            yield f"{printable(file)}:0", RowProblem(printable(file), 0, "", reason)


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
        for _, example in parsed_rows(source, pairing=pairing, on_bytes=on_bytes):
            if isinstance(example, RowProblem):
                report(example)
            elif not problems:
                yield example
    raise_problems(problems)


def parsed_rows(
    source: DataSource, *, pairing: Pairing | None = None, on_bytes: OnBytes | None = None
) -> Iterator[tuple[dict[str, Any], Example | RowProblem]]:
    """Reads the rows of a source and checks them.

    Args:
        source: The data; its ``max_samples`` and ``subset`` are taken into account.
        pairing: Overrides that of the source.
        on_bytes: See `read_rows`.

    Yields:
        The row as it was read, and its `Example`, or what is wrong with it. Where it could not even be read,
        the row is empty.
    """
    for count, (place, row) in enumerate(source.rows(on_bytes)):
        if count == source.max_samples:
            return
        if isinstance(row, RowProblem):
            yield {}, row
            continue
        named = row
        if source.subset is not None and row.get("subset") is None:
            named = row | {"subset": source.subset}
        try:
            checked = parse_row(named)
        except RowError as error:
            yield row, RowProblem.at(place, error)
        else:
            yield row, checked.to_example(place, pairing=pairing or source.pairing, weight=source.weight)


def place_below(folder: str | None, place: str) -> str:
    """The place of a row without the folder that was given, so that it is the same wherever the folder is.

    >>> place_below("some", "some/table/file.jsonl:3"), place_below(None, "some/file.jsonl:3")
    ('table/file.jsonl:3', 'file.jsonl:3')
    """
    return os.path.relpath(place, printable(folder)) if folder is not None else Path(place).name


def _read_parquet(file: str, on_bytes: OnBytes | None) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise PolarError(f"{file}: reading Parquet needs pyarrow: pip install pyarrow") from error
    name, number, total = printable(file), 0, 0
    try:
        with parquet.ParquetFile(file) as table:
            size, total = os.path.getsize(file), table.metadata.num_rows
            columns = table.schema_arrow.names
            if twice := sorted({column for column in columns if columns.count(column) > 1}):
                reason = f"has the column {twice[0]!r} twice — keep one of them"
                yield f"{name}:0", FileProblem(name, 0, "", reason)
                return
            for batch in table.iter_batches(batch_size=256):
                for row in _rows_of(batch):
                    number += 1
                    problem = RowProblem(name, number, "", row) if isinstance(row, str) else row
                    yield f"{name}:{number}", problem
                if on_bytes is not None:
                    on_bytes(size * batch.num_rows // max(1, total))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = f"is not readable Parquet ({first_line(error, 160)})"
        if total:
            reason += f": {total - number:,} of {total:,} rows were not read"
        place = number + 1 if total else 0
        yield f"{name}:{place}", FileProblem(name, place, "", f"{reason} — write the file again")


def _rows_of(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The rows of a batch; what is wrong with a row that cannot be decoded."""
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:  # raised before the first row
        pass
    for number in range(batch.num_rows):
        try:
            [row] = batch.slice(number, 1).to_pylist()
        except UnicodeDecodeError as error:
            byte = f"0x{error.object[error.start]:02x} at byte {error.start + 1} of a text"
            yield f"is not valid UTF-8 ({byte}) — write the file again with texts in UTF-8"
        else:
            yield row


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
    place, number = f"{name}[{split}]", 0
    try:
        for number, row in enumerate(dataset, start=1):
            yield f"{place}:{number}", dict(row)
    except Exception as error:  # of a feature that cannot be decoded, or a damaged file in the cache
        reason = f"cannot be read further ({type(error).__name__}: {first_line(error)}) — download it again"
        yield f"{place}:{number + 1}", FileProblem(place, number + 1, "", reason)
