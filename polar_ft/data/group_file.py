"""Token groups in Arrow files: written in batches, read by number from memory-mapped files."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from polar_ft.groups import TokenGroup

SCHEMA = pa.schema(
    [
        ("key", pa.binary(16)),
        ("ids", pa.list_(pa.int32())),  # the prefix, then every branch
        ("prefix", pa.int32()),  # tokens of the prefix
        ("branches", pa.list_(pa.int32())),  # tokens of each branch
        ("pairs", pa.list_(pa.int32())),  # chosen, rejected, chosen, rejected, …
        ("margins", pa.list_(pa.float32())),
        ("weights", pa.list_(pa.float32())),
        ("source", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """One row of a file.

    Attributes:
        key: 16 bytes, equal for groups of the same prompt and reference.
        group: The group; what was cut from its texts is not stored.
        source: "file:line" of its first row of data.
    """

    key: bytes
    group: TokenGroup
    source: str


class GroupWriter:
    """Writes a file of groups; complete when the ``with`` block ends."""

    def __init__(self, path: Path) -> None:
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, SCHEMA)

    def __enter__(self) -> GroupWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        self._sink.close()

    def write(self, rows: Sequence[StoredGroup]) -> None:
        """Appends rows, as one record batch."""
        if not rows:
            return
        groups = [row.group for row in rows]
        values: dict[str, list[Any]] = {
            "key": [row.key for row in rows],
            "ids": [np.concatenate([group.prefix, *group.branches]) for group in groups],
            "prefix": [len(group.prefix) for group in groups],
            "branches": [[len(branch) for branch in group.branches] for group in groups],
            "pairs": [group.pairs.reshape(-1) for group in groups],
            "margins": [group.margins for group in groups],
            "weights": [group.weights for group in groups],
            "source": [row.source for row in rows],
        }
        columns = [_column(values[field.name], field.type) for field in SCHEMA]
        self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if not pa.types.is_list(kind):
        return pa.array(values, type=kind)
    # Much faster than letting Arrow look at every element.
    offsets = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    dtype = kind.value_type.to_pandas_dtype()
    if isinstance(values[0], np.ndarray):
        flat = np.concatenate(values).astype(dtype, copy=False)
    else:
        flat = np.fromiter(chain.from_iterable(values), dtype, count=int(offsets[-1]))
    return pa.ListArray.from_arrays(offsets, pa.array(flat))


class GroupReader:
    """Groups of one or several files by number, those of the first file first.

    Args:
        paths: Files that `GroupWriter` wrote. They are memory-mapped; arrays of a group are views of that.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        files = [pa.ipc.open_file(pa.memory_map(str(path))) for path in paths]
        self._batches = [_Batch(file.get_batch(i)) for file in files for i in range(file.num_record_batches)]
        self._starts = np.cumsum([0, *(len(batch.prefix) for batch in self._batches)]).tolist()

    def group(self, number: int) -> TokenGroup:
        """The group of that number."""
        batch, row = self._locate(number)
        return batch.group(row)

    def source(self, number: int) -> str:
        """File and line of the group's first row of data."""
        batch, row = self._locate(number)
        return batch.source[row].as_py()

    def _locate(self, number: int) -> tuple[_Batch, int]:
        batch = bisect.bisect_right(self._starts, number) - 1
        return self._batches[batch], number - self._starts[batch]


class _Batch:
    """The columns of a record batch as arrays over the mapped file."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.prefix = _as_numpy(batch.column("prefix"))
        self.source = batch.column("source")
        self._lists = {
            name: (_as_numpy(batch.column(name).offsets), _as_numpy(batch.column(name).values))
            for name in ("ids", "branches", "pairs", "margins", "weights")
        }

    def _values(self, name: str, row: int) -> np.ndarray:
        offsets, values = self._lists[name]
        return values[offsets[row] : offsets[row + 1]]

    def group(self, row: int) -> TokenGroup:
        prefix = int(self.prefix[row])
        ids = self._values("ids", row)
        return TokenGroup(
            prefix=ids[:prefix],
            branches=np.split(ids[prefix:], np.cumsum(self._values("branches", row))[:-1]),
            pairs=self._values("pairs", row).reshape(-1, 2).astype(np.int64),
            margins=self._values("margins", row),
            weights=self._values("weights", row),
        )


def _as_numpy(array: pa.Array) -> np.ndarray:
    """A view of numbers without nulls. ``Array.to_numpy`` would import pandas, which takes half a second."""
    dtype = np.dtype(array.type.to_pandas_dtype())
    if not len(array):
        return np.zeros(0, dtype)
    return np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)
