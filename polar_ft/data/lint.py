"""Checks preference data: what it contains and what is wrong with it, in one pass of little memory."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Literal

import numpy as np
from pydantic import BaseModel, Field

from polar_ft.data.reading import DataSource, OnBytes, RowProblem, read_examples
from polar_ft.data.records import Example, RowError
from polar_ft.groups import TokenGroup
from polar_ft.template import EncodeError, PolarTemplate

FIELDS = ("prompt", "reference", "chosen", "rejected")
BATCH = 64


class Lengths(BaseModel):
    """Lengths of a field over all rows (prompt, reference) or all pairs (chosen, rejected, sequence).

    Attributes:
        count: Number of fields.
        mean: Mean length.
        p50: Median; likewise percentiles 90 and 99.
        p90: See ``p50``.
        p99: See ``p50``.
        max: Greatest length.
        histogram: ``[low, high, count]`` for each range of lengths, both ends included.
    """

    count: int
    mean: float
    p50: int
    p90: int
    p99: int
    max: int
    histogram: list[tuple[int, int, int]]


class FieldCut(BaseModel):
    """What truncation removes from a field.

    Attributes:
        count: Number of fields that are cut.
        tokens: Number of tokens that are cut off in total.
        side: Side on which the field is cut.
    """

    count: int = 0
    tokens: int = 0
    side: Literal["left", "right"]


class SubsetCount(BaseModel):
    """Rows and pairs of a subset."""

    rows: int = 0
    pairs: int = 0


class DataReport(BaseModel):
    """What `check` found. Numbers of pairs count a ranked row once for every pair that it gives.

    Attributes:
        files: Files, folders and data sets that were read.
        unit: Unit of lengths: tokens, or characters where no tokenizer was given.
        max_length: Limit of a sequence in tokens; None without a tokenizer.
        max_response_length: Limit of a response in tokens; None without a tokenizer.
        rows: Rows that can be used.
        bad_rows: Rows that cannot be used.
        pairs: Pairs that the usable rows give.
        prompts: Distinct prompts.
        ties_left_out: Pairs of ranked rows that are dropped, as both responses are ranked the same.
        rows_without_pairs: Ranked rows in which all compared responses are tied.
        duplicate_pairs: Pairs that repeat an earlier one: same prompt, reference, chosen and rejected.
        contradictory_pairs: Pairs that repeat an earlier one with chosen and rejected exchanged.
        prompts_in_several_files: Prompts that more than one file has.
        chosen_equals_rejected: Pairs of two equal texts.
        chosen_equals_rejected_after_truncation: Pairs of equal token ids, those of equal texts included.
        reference_equals_chosen: Pairs whose chosen text is the reference.
        reference_equals_rejected: Pairs whose rejected text is the reference.
        rows_with_several_references: Rows with more than one reference.
        empty: Number of empty texts of each field.
        lengths: Lengths of each field before truncation, and of the complete "sequence" after it.
        truncated: What truncation removes from each field; empty without a tokenizer.
        chosen_longer: Pairs whose chosen text is longer than the rejected one.
        chosen_shorter: Pairs whose chosen text is shorter.
        subsets: Rows and pairs of each subset; "" for rows without one.
        extra_fields: For each unknown field the number of rows that have it; it is kept, or its name is
            misspelt.
        problems: The bad rows.
    """

    files: list[str]
    unit: Literal["tokens", "characters"]
    max_length: int | None = None
    max_response_length: int | None = None
    rows: int = 0
    bad_rows: int = 0
    pairs: int = 0
    prompts: int = 0
    ties_left_out: int = 0
    rows_without_pairs: int = 0
    duplicate_pairs: int = 0
    contradictory_pairs: int = 0
    prompts_in_several_files: int = 0
    chosen_equals_rejected: int = 0
    chosen_equals_rejected_after_truncation: int | None = None
    reference_equals_chosen: int = 0
    reference_equals_rejected: int = 0
    rows_with_several_references: int = 0
    empty: dict[str, int] = Field(default_factory=lambda: dict.fromkeys(FIELDS, 0))
    lengths: dict[str, Lengths] = Field(default_factory=dict)
    truncated: dict[str, FieldCut] = Field(default_factory=dict)
    chosen_longer: int = 0
    chosen_shorter: int = 0
    subsets: dict[str, SubsetCount] = Field(default_factory=dict)
    extra_fields: dict[str, int] = Field(default_factory=dict)
    problems: list[RowProblem] = Field(default_factory=list)


def summarize(lengths: Counter[int]) -> Lengths:
    """Mean, percentiles (nearest rank) and histogram of counted lengths.

    >>> summary = summarize(Counter({2: 1, 3: 1, 5: 2}))
    >>> summary.mean, summary.p50, summary.p90, summary.histogram
    (3.75, 3, 5, [(2, 3, 2), (4, 7, 2)])
    """
    count = lengths.total()
    bins: Counter[int] = Counter()
    for length, n in lengths.items():
        bins[length.bit_length()] += n
    shown = range(min(bins, default=0), max(bins, default=-1) + 1)
    return Lengths(
        count=count,
        mean=round(sum(length * n for length, n in lengths.items()) / count, 2) if count else 0.0,
        p50=_percentile(lengths, 50),
        p90=_percentile(lengths, 90),
        p99=_percentile(lengths, 99),
        max=max(lengths, default=0),
        # Lengths with the same number of binary digits are one range: 0, 1, 2-3, 4-7, 8-15, ...
        histogram=[(1 << bits >> 1, (1 << bits) - 1, bins[bits]) for bits in shown],
    )


def _percentile(lengths: Counter[int], percent: int) -> int:
    rank = -(-lengths.total() * percent // 100)
    for length in sorted(lengths):
        rank -= lengths[length]
        if rank <= 0:
            return length
    return 0


def check(
    sources: Sequence[DataSource],
    template: PolarTemplate | None = None,
    *,
    on_bytes: OnBytes | None = None,
) -> DataReport:
    """Reads all data and reports what it contains and which rows cannot be used.

    Args:
        sources: The data.
        template: Measures lengths in tokens and truncation. Without it lengths are in characters.
        on_bytes: See `polar_ft.data.reading.read_rows`.

    Raises:
        PolarError: A file does not exist.
    """
    lint = _Lint(sources, template)
    problems = lint.report.problems
    examples = read_examples(list(sources), on_problem=problems.append, on_bytes=on_bytes)
    for example, encoded in _encode(examples, template):
        if isinstance(encoded, RowProblem):
            problems.append(encoded)
        else:
            lint.add(example, encoded)
    return lint.finish()


class _Lint:
    """Counts of a pass. Of texts 8 bytes of their hash are kept, about 100 bytes of memory per pair."""

    def __init__(self, sources: Sequence[DataSource], template: PolarTemplate | None) -> None:
        self.report = DataReport(
            files=[source.path for source in sources], unit="characters" if template is None else "tokens"
        )
        if template is not None:
            self.report.max_length = template.max_length
            self.report.max_response_length = template.max_response_length
            self.report.chosen_equals_rejected_after_truncation = 0
            self.report.truncated = {
                name: FieldCut(side="left" if name == "prompt" else "right") for name in FIELDS
            }
        self.lengths: dict[str, Counter[int]] = {name: Counter() for name in FIELDS}
        if template is not None:
            self.lengths["sequence"] = Counter()
        self.seen_pairs: set[int] = set()
        self.prompt_files: dict[int, int] = {}
        self.files: dict[str, int] = {}

    def add(self, example: Example, encoded: TokenGroup | None) -> None:
        report = self.report
        report.rows += 1
        report.pairs += len(example.pairs)
        report.ties_left_out += example.n_ties
        report.rows_without_pairs += not example.pairs
        report.rows_with_several_references += len(example.references) > 1
        subset = report.subsets.setdefault(example.subset or "", SubsetCount())
        subset.rows += 1
        subset.pairs += len(example.pairs)
        for name in example.extra:
            report.extra_fields[name] = report.extra_fields.get(name, 0) + 1

        file = example.source.rpartition(":")[0]
        bit = 1 << self.files.setdefault(file, len(self.files))
        prompt = _hash(example.prompt)
        self.prompt_files[prompt] = self.prompt_files.get(prompt, 0) | bit

        if encoded is None or encoded.lengths is None:
            prompt_length, reference_length = len(example.prompt), len(example.reference)
            candidate_lengths: Sequence[int] = [len(text) for text in example.candidates]
        else:
            prompt_length, reference_length = encoded.lengths.prompt, encoded.lengths.reference
            candidate_lengths = encoded.lengths.candidates
        cut = None if encoded is None else encoded.cut
        self._measure("prompt", example.prompt, prompt_length, cut.prompt if cut else 0)
        self._measure("reference", example.reference, reference_length, cut.reference if cut else 0)
        for chosen, rejected in example.pairs:
            for name, i in (("chosen", chosen), ("rejected", rejected)):
                tokens_cut = cut.candidates[i] if cut else 0
                self._measure(name, example.candidates[i], candidate_lengths[i], tokens_cut)
                if encoded is not None:
                    self.lengths["sequence"][len(encoded.prefix) + len(encoded.branches[i])] += 1
            report.chosen_longer += candidate_lengths[chosen] > candidate_lengths[rejected]
            report.chosen_shorter += candidate_lengths[chosen] < candidate_lengths[rejected]
            self._compare(example, chosen, rejected, encoded)

    def _measure(self, name: str, text: str, length: int, cut: int) -> None:
        self.lengths[name][length] += 1
        self.report.empty[name] += not text
        if cut:
            self.report.truncated[name].count += 1
            self.report.truncated[name].tokens += cut

    def _compare(self, example: Example, chosen: int, rejected: int, encoded: TokenGroup | None) -> None:
        report = self.report
        better, worse = example.candidates[chosen], example.candidates[rejected]
        report.chosen_equals_rejected += better == worse
        if example.reference:  # equal empty texts do not suggest a mistake
            report.reference_equals_chosen += example.reference == better
            report.reference_equals_rejected += example.reference == worse
        if encoded is not None and report.chosen_equals_rejected_after_truncation is not None:
            same = np.array_equal(encoded.branches[chosen], encoded.branches[rejected])
            report.chosen_equals_rejected_after_truncation += same
        pair = _hash(example.prompt, example.reference, better, worse)
        exchanged = _hash(example.prompt, example.reference, worse, better)
        report.duplicate_pairs += pair in self.seen_pairs
        report.contradictory_pairs += exchanged in self.seen_pairs and better != worse
        self.seen_pairs.add(pair)

    def finish(self) -> DataReport:
        report = self.report
        report.bad_rows = len(report.problems)
        report.prompts = len(self.prompt_files)
        report.prompts_in_several_files = sum(bits.bit_count() > 1 for bits in self.prompt_files.values())
        report.lengths = {name: summarize(lengths) for name, lengths in self.lengths.items()}
        return report


def _hash(*texts: str) -> int:
    digest = hashlib.blake2b("\0".join(texts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


Measured = list[tuple[Example, "TokenGroup | RowProblem | None"]]


def _encode(
    examples: Iterable[Example], template: PolarTemplate | None
) -> Iterator[tuple[Example, TokenGroup | RowProblem | None]]:
    """Encodes examples in threads, in order; the tokenizer releases the GIL."""
    if template is None:
        yield from ((example, None) for example in examples)
        return
    examples = iter(examples)
    workers = min(8, os.cpu_count() or 1)
    pending: deque[Future[Measured]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        while True:
            while len(pending) < 2 * workers and (batch := list(islice(examples, BATCH))):
                pending.append(pool.submit(_encode_batch, batch, template))
            if not pending:
                return
            yield from pending.popleft().result()


def _encode_batch(batch: list[Example], template: PolarTemplate) -> Measured:
    return [
        (example, RowProblem.at(example.source, RowError("", str(encoded))))
        if isinstance(encoded, EncodeError)
        else (example, encoded)
        for example, encoded in zip(batch, template.encode_each(batch, measure=True), strict=True)
    ]
