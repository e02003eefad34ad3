"""Tokenizes preference data into a cache on disk, whose token groups are memory-mapped.

The first start with some data tokenizes it on all cores and writes Arrow files (`polar_ft.data.group_file`)
into the cache folder; a later start with the same files, tokenizer and limits maps those files. Only a few
numbers for each group are in memory. Of processes on one machine that start together, one writes the cache
and the others wait.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
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

from polar_ft.data.group_file import GroupReader, GroupWriter, StoredGroup
from polar_ft.data.reading import DataSource, expand, read_examples
from polar_ft.data.records import Example
from polar_ft.errors import PolarError
from polar_ft.groups import MergedTexts, TokenGroup, merge_texts, merge_token_groups, select_pairs
from polar_ft.template import EncodeError, PolarTemplate

FORMAT = 2  # raise when the layout or meaning of the cache changes
BATCH = 512

# The groups of each batch of rows; and the merged groups of prompts and references that several batches hold.
_GROUPS, _MERGED = "groups.arrow", "merged.arrow"


class TokenizationSummary(BaseModel):
    """Counts of tokenization, over all data.

    Attributes:
        rows: Rows that were read.
        pairs: Pairs to train on.
        groups: Distinct (prompt, reference).
        ties: Pairs of equal score in ranked rows, which are dropped.
        identical_pairs: Pairs whose sides have the same tokens, as given or after truncation; they are
            dropped.
        prompts_cut: Rows whose prompt was cut on the left.
        references_cut: Rows whose reference was cut on the right.
        candidates_cut: Candidates that were cut on the right.
        references_dropped: Rows whose reference was dropped by ``reference_dropout``.
        tree_tokens: Tokens to compute when prefixes are shared.
        flat_tokens: Tokens of all pairs as separate sequences.
        seconds: Time that tokenization took.
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
        """The summary in words; counts that are zero and harmless are omitted."""
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
    """The groups of a tokenized data set, read from disk on access.

    Attributes:
        summary: Counts of tokenization.
        pairs: [groups], number of pairs.
        weights: [groups], sum of the weights of the pairs.
        tokens: For each layout [groups], number of tokens to compute.
        attended: For each layout [groups], number of query-key pairs of causal attention.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.summary = TokenizationSummary.model_validate_json((folder / "summary.json").read_text())
        self._reader = _open(folder)
        with np.load(folder / "sizes.npz") as sizes:
            self._rows = sizes["rows"]
            self.pairs = sizes["pairs"]
            self.weights = sizes["weights"]
            self.tokens = {"tree": sizes["tree_tokens"], "flat": sizes["flat_tokens"]}
            self.attended = {"tree": sizes["tree_attended"], "flat": sizes["flat_attended"]}

    def __len__(self) -> int:
        return len(self.pairs)

    def __getstate__(self) -> dict[str, Any]:
        # A DataLoader worker maps the files itself.
        return {name: value for name, value in self.__dict__.items() if name != "_reader"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reader = _open(self.folder)

    def group(self, index: int) -> TokenGroup:
        """The group of that index."""
        return self._reader.group(int(self._rows[index]))

    def source(self, index: int) -> str:
        """File and line of the first row of the group."""
        return self._reader.source(int(self._rows[index]))


def _open(folder: Path) -> GroupReader:
    return GroupReader([folder / _GROUPS, folder / _MERGED])


def tokenize(
    sources: Sequence[DataSource],
    template: PolarTemplate,
    cache_dir: str | os.PathLike[str],
    *,
    reference_dropout: float = 0.0,
    seed: int = 0,
) -> TokenizedGroups:
    """Tokenizes data, or maps the cache of an earlier start.

    Args:
        sources: The data.
        template: The template with its tokenizer and limits.
        cache_dir: Folder of caches, with a sub-folder for each combination of data and template.
        reference_dropout: Share of the groups whose reference is dropped, so that the model also learns to
            score without one. A hash of (seed, prompt, reference) decides, so that the choice is the same at
            every start.
        seed: See ``reference_dropout``.

    Raises:
        DataError: A row cannot be used.
        PolarError: The data has no pair, or a reference leaves no room for the prompt.
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


def _cache_key(sources: Sequence[DataSource], template: PolarTemplate, dropout: float, seed: int) -> str:
    """Name of the cache folder; changes with files (path, size, time of change), settings and format."""
    parts: list[Any] = [FORMAT, template.fingerprint, dropout, seed if dropout else 0]
    for source in sources:
        files = map(Path, expand(source.path))
        stats = [(str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
        parts.append([source.model_dump(mode="json"), stats])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _write_cache(
    folder: Path, sources: Sequence[DataSource], template: PolarTemplate, dropout: float, seed: int
) -> None:
    started = time.monotonic()
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a start that was interrupted
    partial.mkdir()
    summary = TokenizationSummary()
    rows_of: dict[bytes, list[int]] = {}  # in the order of first appearance
    sizes: list[list[float]] = []
    with GroupWriter(partial / _GROUPS) as writer:
        for rows in _tokenize_batches(read_examples(sources), template, dropout, seed, summary):
            for row in rows:
                rows_of.setdefault(row.key, []).append(len(sizes))
                sizes.append(_sizes(row.group))
            writer.write(rows)
    order = _merge_repeated(partial, rows_of, sizes)
    columns = dict(zip(_SIZES, np.array(sizes).reshape(-1, len(_SIZES))[order].T, strict=True))
    arrays = {
        name: values if name == "weights" else values.astype(np.int64) for name, values in columns.items()
    }
    np.savez(partial / "sizes.npz", rows=order, **arrays)  # type: ignore[arg-type]
    summary.groups = len(order)
    for name in ("pairs", "tree_tokens", "flat_tokens"):
        setattr(summary, name, int(arrays[name].sum()))
    summary.seconds = round(time.monotonic() - started, 2)
    (partial / "summary.json").write_text(summary.model_dump_json(indent=1))
    partial.rename(folder)


def _tokenize_batches(
    examples: Iterable[Example],
    template: PolarTemplate,
    dropout: float,
    seed: int,
    summary: TokenizationSummary,
) -> Iterator[list[StoredGroup]]:
    """Tokenizes examples in batches; the next batch is read while others are encoded."""

    def encode(batch: list[Example]) -> list[tuple[MergedTexts, TokenGroup]]:
        merged = merge_texts(batch)
        try:
            encoded = template.encode([texts.group for texts in merged])
        except EncodeError as error:
            first, _ = merged[error.index].members[0]
            raise PolarError(f"{batch[first].source}: {error}") from error
        return list(zip(merged, encoded, strict=True))

    progress = Progress(
        SpinnerColumn(),
        TextColumn("tokenizing"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    # Two at a time: while the ids of one batch become arrays, the cores tokenize the other one.
    with progress, ThreadPoolExecutor(2) as pool:
        task = progress.add_task("tokenizing", total=None)
        iterator = iter(examples)
        pending: deque[tuple[list[Example], Future[list[tuple[MergedTexts, TokenGroup]]]]] = deque()
        while True:
            batch = [_drop_reference(e, dropout, seed, summary) for e in islice(iterator, BATCH)]
            if batch:
                pending.append((batch, pool.submit(encode, batch)))
            if not pending:
                return
            if len(pending) > 2 or not batch:
                examples_of_rows, future = pending.popleft()
                encoded = future.result()
                progress.advance(task, len(examples_of_rows))
                rows = (_to_row(examples_of_rows, texts, tokens, summary) for texts, tokens in encoded)
                yield [row for row in rows if row is not None]


def _drop_reference(example: Example, dropout: float, seed: int, summary: TokenizationSummary) -> Example:
    if not dropout or not example.reference:
        return example
    digest = hashlib.blake2b(
        f"{seed}\0{example.prompt}\0{example.reference}".encode(), digest_size=8
    ).digest()
    if int.from_bytes(digest, "big") / 2**64 >= dropout:
        return example
    summary.references_dropped += 1
    return replace(example, references=("",))


def _to_row(
    batch: Sequence[Example], texts: MergedTexts, encoded: TokenGroup, summary: TokenizationSummary
) -> StoredGroup | None:
    """Makes the row of a group from its pairs that are not identical, and counts; None if none is left."""
    cut = encoded.cut
    source_of_pair: list[str] = []
    for number, place in texts.members:
        example = batch[number]
        summary.rows += 1
        summary.ties += example.n_ties
        summary.prompts_cut += bool(cut.prompt)
        summary.references_cut += bool(cut.reference)
        summary.candidates_cut += sum(bool(cut.candidates[i]) for i in place)
        source_of_pair += [example.source] * len(example.pairs)
    merged = merge_token_groups([encoded])
    different = np.flatnonzero(merged.pairs[:, 0] != merged.pairs[:, 1])
    summary.identical_pairs += len(merged.pairs) - len(different)
    if not len(different):
        return None
    key = hashlib.blake2b("\0".join(texts.group.key).encode(), digest_size=16).digest()
    return StoredGroup(key, select_pairs(merged, different), source_of_pair[different[0]])


def _merge_repeated(folder: Path, rows_of: dict[bytes, list[int]], sizes: list[list[float]]) -> np.ndarray:
    """Merges groups whose prompt and reference occur in several batches, into a second file.

    Their rows in the first file are not used any more; all other rows stay where they are.

    Args:
        folder: Folder of the cache.
        rows_of: Rows of each key.
        sizes: Sizes of each row; those of the merged groups are appended.

    Returns:
        The row of each group, [groups] int64; the rows of the second file follow those of the first.
    """
    reader = GroupReader([folder / _GROUPS])
    order = []
    with GroupWriter(folder / _MERGED) as writer:
        batch: list[StoredGroup] = []
        rows_in_batch = 0
        for key, rows in rows_of.items():
            if len(rows) == 1:
                order.append(rows[0])
                continue
            group = merge_token_groups([reader.group(row) for row in rows])
            order.append(len(sizes))
            sizes.append(_sizes(group))
            batch.append(StoredGroup(key, group, reader.source(rows[0])))
            # Bounded by the rows that were merged, so that a batch takes about as much memory as one of rows.
            rows_in_batch += len(rows)
            if rows_in_batch >= BATCH:
                writer.write(batch)
                batch, rows_in_batch = [], 0
        writer.write(batch)
    return np.array(order, dtype=np.int64)


# What a step plan needs of a group.
_SIZES = ("pairs", "weights", "tree_tokens", "flat_tokens", "tree_attended", "flat_attended")


def _sizes(group: TokenGroup) -> list[float]:
    return [
        len(group.pairs),
        float(group.weights.sum(dtype=np.float64)),
        group.tree_tokens(),
        group.flat_tokens(),
        group.attended("tree"),
        group.attended("flat"),
    ]
