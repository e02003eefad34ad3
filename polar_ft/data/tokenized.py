"""Tokenized data on disk: rows of preference data in, groups of token ids out, memory-mapped.

The first start on some data tokenizes it, all cores at work, into an Arrow file under the cache folder; a
later start with the same files, tokenizer and limits maps that file. Nothing of it is held in memory beside
a few numbers for each group. Processes of one machine that start together wait for one of them to write it.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock
from pydantic import BaseModel
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from polar_ft.data.packing import Group
from polar_ft.data.reading import DataSource, read_examples
from polar_ft.data.records import Example
from polar_ft.errors import PolarError
from polar_ft.template import EncodedParts, Fields, PolarTemplate, common_prefix_length

FORMAT = 1  # raise when the layout or meaning of the cache changes
BATCH = 512

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


class TokenizationSummary(BaseModel):
    """What became of the rows; every number is of the whole data.

    Attributes:
        rows: Rows read.
        pairs: Pairs that are trained on.
        groups: Distinct (prompt, reference).
        ties: Pairs of equal score in ranked rows, left out.
        identical_pairs: Pairs whose two sides have the same tokens, as given or after truncation, left out.
        prompts_cut: Rows whose prompt was cut on the left.
        references_cut: Rows whose reference was cut on the right.
        candidates_cut: Candidates that were cut on the right.
        references_dropped: Rows whose reference was left out on purpose (``reference_dropout``).
        tree_tokens: Tokens to compute when prefixes are shared.
        flat_tokens: Tokens of all pairs as separate sequences.
        seconds: Time that tokenizing took.
    """

    rows: int = 0
    pairs: int = 0
    groups: int = 0
    ties: int = 0
    identical_pairs: int = 0
    prompts_cut: int = 0
    references_cut: int = 0
    candidates_cut: int = 0
    references_dropped: int = 0
    tree_tokens: int = 0
    flat_tokens: int = 0
    seconds: float = 0.0

    def lines(self) -> list[str]:
        """The summary in words; what is zero and harmless is left out."""
        saved = 1 - self.tree_tokens / self.flat_tokens if self.flat_tokens else 0.0
        lines = [
            f"{self.rows:,} rows, {self.pairs:,} pairs, {self.groups:,} groups of one prompt and reference; "
            f"{self.tree_tokens:,} tokens with shared prefixes, {self.flat_tokens:,} without "
            f"({saved:.0%} saved)"
        ]
        cuts = [
            f"{count:,} {what}"
            for count, what in (
                (self.prompts_cut, "prompts on the left"),
                (self.references_cut, "references on the right"),
                (self.candidates_cut, "candidates on the right"),
            )
            if count
        ]
        lines.append(f"cut to fit: {', '.join(cuts)}" if cuts else "nothing had to be cut to fit")
        if self.ties:
            lines.append(f"left out: {self.ties:,} pairs of equal score in ranked rows")
        if self.identical_pairs:
            lines.append(
                f"left out: {self.identical_pairs:,} pairs whose chosen and rejected have the same tokens "
                f"(as given, or after cutting); they teach nothing"
            )
        if self.references_dropped:
            lines.append(f"{self.references_dropped:,} rows without their reference (reference_dropout)")
        return lines


class TokenizedGroups:
    """The groups of a tokenized data set, read from disk when asked for.

    Attributes:
        summary: What became of the rows.
        pairs: [groups], number of pairs.
        weights: [groups], sum of the weights of the pairs.
        tokens: For each layout [groups], tokens to compute.
        attended: For each layout [groups], query-key pairs of causal attention.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.summary = TokenizationSummary.model_validate_json((folder / "summary.json").read_text())
        self._rows = _RowReader(folder / "groups.arrow")
        with np.load(folder / "sizes.npz") as sizes:
            self.pairs = sizes["pairs"]
            self.weights = sizes["weights"]
            self.tokens = {"tree": sizes["tree_tokens"], "flat": sizes["flat_tokens"]}
            self.attended = {"tree": sizes["tree_attended"], "flat": sizes["flat_attended"]}

    def __len__(self) -> int:
        return len(self.pairs)

    def __getstate__(self) -> dict[str, Any]:
        # A DataLoader worker maps the file itself.
        return {name: value for name, value in self.__dict__.items() if name != "_rows"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._rows = _RowReader(self.folder / "groups.arrow")

    def group(self, index: int) -> Group:
        """The group of that index."""
        return self._rows.group(index)

    def source(self, index: int) -> str:
        """File and line of the first row of the group."""
        return self._rows.source(index)


def tokenize(
    sources: Sequence[DataSource],
    template: PolarTemplate,
    cache_dir: str | os.PathLike[str],
    *,
    reference_dropout: float = 0.0,
    seed: int = 0,
) -> TokenizedGroups:
    """Tokenizes data, or maps what an earlier start tokenized.

    Args:
        sources: The data.
        template: The template with its tokenizer and limits.
        cache_dir: Where tokenized data is kept; a sub-folder for each combination of data and template.
        reference_dropout: Share of the groups whose reference is left out, so that the model also learns to
            score without one. The choice is by hash of (seed, prompt, reference): the same at every start.
        seed: See ``reference_dropout``.

    Raises:
        DataError: A row is bad.
        PolarError: The data has no pair, or a reference leaves its prompt no room.
    """
    if not 0 <= reference_dropout <= 1:
        raise PolarError(f"reference_dropout is a share between 0 and 1, not {reference_dropout}")
    key = _cache_key(sources, template, reference_dropout, seed)
    folder = Path(cache_dir).expanduser().absolute() / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "summary.json").is_file():
            _write_cache(folder, sources, template, reference_dropout, seed)
    groups = TokenizedGroups(folder)
    if not len(groups):
        raise PolarError(
            f"{', '.join(source.path for source in sources)}: {groups.summary.rows} rows gave no pair to "
            f"train on; `polar-ft data check` says why"
        )
    return groups


def merge_groups(groups: Sequence[Group]) -> Group:
    """One group of several with the same prompt and reference; equal candidates become one branch.

    >>> rest = np.array([[0, 1]]), np.zeros(1), np.ones(1)
    >>> a = Group(np.array([5]), [np.array([1, 9]), np.array([2, 9])], *rest)
    >>> b = Group(np.array([5]), [np.array([3, 9]), np.array([1, 9])], *rest)
    >>> merged = merge_groups([a, b])
    >>> [branch.tolist() for branch in merged.branches], merged.pairs.tolist()
    ([[1, 9], [2, 9], [3, 9]], [[0, 1], [2, 0]])
    """
    sequences: dict[bytes, int] = {}
    ids: list[np.ndarray] = []
    pairs = []
    for group in groups:
        index = []
        for branch in group.branches:
            sequence = np.concatenate([group.prefix, branch])
            number = sequences.setdefault(sequence.tobytes(), len(ids))
            if number == len(ids):
                ids.append(sequence)
            index.append(number)
        pairs.append(np.asarray(index)[group.pairs])
    prefix = common_prefix_length(ids)
    return Group(
        prefix=ids[0][:prefix],
        branches=[sequence[prefix:] for sequence in ids],
        pairs=np.concatenate(pairs),
        margins=np.concatenate([group.margins for group in groups]),
        weights=np.concatenate([group.weights for group in groups]),
    )


def _cache_key(sources: Sequence[DataSource], template: PolarTemplate, dropout: float, seed: int) -> str:
    """Name of the cache folder: changes with the files (path, size, time of change), settings and format."""
    parts: list[Any] = [FORMAT, template.fingerprint, dropout, seed if dropout else 0]
    for source in sources:
        path = Path(source.path)
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        stats = [(str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
        parts.append([source.model_dump(mode="json"), stats])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _write_cache(
    folder: Path, sources: Sequence[DataSource], template: PolarTemplate, dropout: float, seed: int
) -> None:
    started = time.monotonic()
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(exist_ok=True)
    summary = TokenizationSummary()
    examples = read_examples(sources)
    keys: list[bytes] = []
    with _ArrowWriter(partial / "rows.arrow") as writer:
        for rows in _tokenize_batches(examples, template, dropout, seed, summary):
            keys += [row["key"] for row in rows]
            writer.write(rows)
    _merge_rows(partial, keys, summary)
    summary.seconds = round(time.monotonic() - started, 2)
    (partial / "summary.json").write_text(summary.model_dump_json(indent=1))
    partial.rename(folder)


def _tokenize_batches(
    examples: Iterable[Example],
    template: PolarTemplate,
    dropout: float,
    seed: int,
    summary: TokenizationSummary,
) -> Iterator[list[dict[str, Any]]]:
    """Rows of the cache, a batch at a time. While batches are encoded, the next one is read."""

    def encode(batch: list[Example]) -> list[tuple[_Bundle, EncodedParts]]:
        bundles = _bundle(batch)
        fields = [bundle.fields for bundle in bundles]
        try:
            return list(zip(bundles, template.encode_parts(fields), strict=True))
        except PolarError:  # find the row, so that the message names it
            for bundle in bundles:
                try:
                    template.encode_parts([bundle.fields])
                except PolarError as error:
                    raise PolarError(f"{bundle.examples[0].source}: {error}") from error
            raise

    progress = Progress(
        SpinnerColumn(),
        TextColumn("tokenizing"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    # Two at a time: while the ids of one batch become arrays, the cores tokenize the other.
    with progress, ThreadPoolExecutor(2) as pool:
        task = progress.add_task("tokenizing", total=None)
        iterator = iter(examples)
        pending: deque[Future[list[tuple[_Bundle, EncodedParts]]]] = deque()
        while True:
            batch = [_drop_reference(e, dropout, seed, summary) for e in islice(iterator, BATCH)]
            if batch:
                pending.append(pool.submit(encode, batch))
            if not pending:
                return
            if len(pending) > 2 or not batch:
                encoded = pending.popleft().result()
                progress.advance(task, sum(len(bundle.examples) for bundle, _ in encoded))
                yield [row for pair in encoded if (row := _to_row(*pair, summary)) is not None]


def _drop_reference(example: Example, dropout: float, seed: int, summary: TokenizationSummary) -> Example:
    if not dropout or not example.reference:
        return example
    digest = hashlib.blake2b(
        f"{seed}\0{example.prompt}\0{example.reference}".encode(), digest_size=8
    ).digest()
    if int.from_bytes(digest, "big") / 2**64 >= dropout:
        return example
    summary.references_dropped += 1
    return replace(example, reference="")


@dataclass(frozen=True)
class _Bundle:
    """Examples of one (prompt, reference), so that what they share is encoded once.

    Attributes:
        examples: In the order of the data, at least one.
        candidates: Their different candidates, each with its index.
    """

    examples: list[Example]
    candidates: dict[str, int]

    @property
    def fields(self) -> Fields:
        first = self.examples[0]
        return first.prompt, first.reference, list(self.candidates), first.wrapper


def _bundle(batch: Iterable[Example]) -> list[_Bundle]:
    bundles: dict[tuple[str, str, str], _Bundle] = {}
    for example in batch:
        key = (example.wrapper, example.prompt, example.reference)
        bundle = bundles.setdefault(key, _Bundle([], {}))
        bundle.examples.append(example)
        for candidate in example.candidates:
            bundle.candidates.setdefault(candidate, len(bundle.candidates))
    return list(bundles.values())


def _to_row(bundle: _Bundle, encoded: EncodedParts, summary: TokenizationSummary) -> dict[str, Any] | None:
    cut, tails = encoded.cut, encoded.tails
    used: dict[int, int] = {}  # a candidate without a pair is not computed
    pairs: list[int] = []
    margins: list[float] = []
    weights: list[float] = []
    source = ""
    for example in bundle.examples:
        index = [bundle.candidates[candidate] for candidate in example.candidates]
        summary.rows += 1
        summary.ties += example.n_ties
        summary.prompts_cut += bool(cut.prompt)
        summary.references_cut += bool(cut.reference)
        summary.candidates_cut += sum(bool(cut.candidates[i]) for i in index)
        for (c, r), margin, weight in zip(example.pairs, example.margins, example.weights, strict=True):
            chosen, rejected = index[c], index[r]
            if chosen == rejected or np.array_equal(tails[chosen], tails[rejected]):
                summary.identical_pairs += 1
                continue
            pairs += (used.setdefault(chosen, len(used)), used.setdefault(rejected, len(used)))
            margins.append(margin or 0.0)
            weights.append(weight)
            source = source or example.source
    if not pairs:
        return None
    first = bundle.examples[0]
    text = "\0".join((first.wrapper, first.prompt, first.reference))
    branches = [tails[i] for i in used]
    shared = common_prefix_length(branches)
    return {
        "key": hashlib.blake2b(text.encode(), digest_size=16).digest(),
        "ids": np.concatenate([encoded.head, branches[0][:shared], *(tail[shared:] for tail in branches)]),
        "prefix": len(encoded.head) + shared,
        "branches": [len(tail) - shared for tail in branches],
        "pairs": pairs,
        "margins": margins,
        "weights": weights,
        "source": source,
    }


def _merge_rows(folder: Path, keys: list[bytes], summary: TokenizationSummary) -> None:
    """Writes ``groups.arrow``, rows of one prompt and reference merged, in the order of first appearance."""
    rows_of: dict[bytes, list[int]] = {}
    for row, key in enumerate(keys):
        rows_of.setdefault(key, []).append(row)
    rows = _RowReader(folder / "rows.arrow")
    sizes: dict[str, list[float]] = {
        name: []
        for name in ("pairs", "weights", "tree_tokens", "flat_tokens", "tree_attended", "flat_attended")
    }
    with _ArrowWriter(folder / "groups.arrow") as writer:
        batch = []
        for key, members in rows_of.items():
            # Merging also drops equal candidates within one row.
            group = merge_groups([rows.group(row) for row in members])
            for name, value in _sizes(group).items():
                sizes[name].append(value)
            batch.append(_group_to_row(group, key, rows.source(members[0])))
            if len(batch) == BATCH:
                writer.write(batch)
                batch = []
        writer.write(batch)
    (folder / "rows.arrow").unlink()
    arrays: dict[str, Any] = {
        name: np.array(values, dtype=np.float64 if name in ("weights",) else np.int64)
        for name, values in sizes.items()
    }
    np.savez(folder / "sizes.npz", **arrays)
    summary.groups = len(rows_of)
    summary.pairs = int(arrays["pairs"].sum())
    summary.tree_tokens = int(arrays["tree_tokens"].sum())
    summary.flat_tokens = int(arrays["flat_tokens"].sum())


def _sizes(group: Group) -> dict[str, float]:
    return {
        "pairs": len(group.pairs),
        "weights": float(group.weights.sum(dtype=np.float64)),
        "tree_tokens": group.tree_tokens(),
        "flat_tokens": group.flat_tokens(),
        "tree_attended": group.attended("tree"),
        "flat_attended": group.attended("flat"),
    }


def _group_to_row(group: Group, key: bytes, source: str) -> dict[str, Any]:
    return {
        "key": key,
        "ids": np.concatenate([group.prefix, *group.branches]).astype(np.int32),
        "prefix": len(group.prefix),
        "branches": [len(branch) for branch in group.branches],
        "pairs": group.pairs.reshape(-1),
        "margins": group.margins,
        "weights": group.weights,
        "source": source,
    }


class _ArrowWriter:
    def __init__(self, path: Path) -> None:
        self.sink = pa.OSFile(str(path), "wb")
        self.writer = pa.ipc.new_file(self.sink, SCHEMA)

    def __enter__(self) -> _ArrowWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.close()
        self.sink.close()

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        if rows:
            columns = [_column([row[field.name] for row in rows], field.type) for field in SCHEMA]
            self.writer.write_batch(pa.record_batch(columns, schema=SCHEMA))


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if not pa.types.is_list(kind):
        return pa.array(values, type=kind)
    # Much faster than to let Arrow look at every element.
    offsets = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    dtype = kind.value_type.to_pandas_dtype()
    if isinstance(values[0], np.ndarray):
        flat = np.concatenate(values).astype(dtype, copy=False)
    else:
        flat = np.fromiter(chain.from_iterable(values), dtype, count=int(offsets[-1]))
    return pa.ListArray.from_arrays(offsets, pa.array(flat))


class _RowReader:
    """Rows of an Arrow file by number."""

    def __init__(self, path: Path) -> None:
        self.file = pa.ipc.open_file(pa.memory_map(str(path)))
        self.batches = [_Batch(self.file.get_batch(i)) for i in range(self.file.num_record_batches)]
        self.starts = np.concatenate([[0], np.cumsum([len(b.prefix) for b in self.batches])]).tolist()

    def _locate(self, row: int) -> tuple[_Batch, int]:
        number = bisect.bisect_right(self.starts, row) - 1
        return self.batches[number], row - self.starts[number]

    def group(self, row: int) -> Group:
        batch, index = self._locate(row)
        return batch.group(index)

    def source(self, row: int) -> str:
        batch, index = self._locate(row)
        return batch.source[index].as_py()


class _Batch:
    """A record batch as arrays that look into the mapped file; a row is copied when asked for."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.prefix = batch.column("prefix").to_numpy()
        self.source = batch.column("source")
        self.lists = {
            name: (batch.column(name).offsets.to_numpy(), batch.column(name).values.to_numpy())
            for name in ("ids", "branches", "pairs", "margins", "weights")
        }

    def _values(self, name: str, row: int) -> np.ndarray:
        offsets, values = self.lists[name]
        return values[offsets[row] : offsets[row + 1]]

    def group(self, row: int) -> Group:
        prefix = int(self.prefix[row])
        ids = self._values("ids", row).astype(np.int64)
        return Group(
            prefix=ids[:prefix],
            branches=np.split(ids[prefix:], np.cumsum(self._values("branches", row))[:-1]),
            pairs=self._values("pairs", row).reshape(-1, 2).astype(np.int64),
            margins=self._values("margins", row),
            weights=self._values("weights", row),
        )
