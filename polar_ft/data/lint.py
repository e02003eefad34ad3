"""Checks preference data: what it contains and what is wrong with it, in one pass of little memory."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from polar_ft.data.reading import DataSource, OnBytes, RowProblem, expand, parsed_rows, read_examples
from polar_ft.data.records import Example, RowError, batches
from polar_ft.data.split import prompt_key
from polar_ft.groups import TokenGroup
from polar_ft.template import EncodeError, PolarTemplate

FIELDS = ("prompt", "reference", "chosen", "rejected")
BATCH = 64
NAMED = 20
# Above this, taking the longer answer is a better rule than what most models learn.
LONGER_WINS_TOO_OFTEN = 0.9


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
        bad_rows: Rows that cannot be used, and files that cannot be read to the end.
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
        repeated_ids: Rows with the id of an earlier row.
        held_out_prompts: Rows whose prompt is in the held-out data; None if no such data was given.
        named: For each kind of finding the first rows that have it, at most `NAMED` of them.
        warnings: What is unusual about the data as a whole.
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
    repeated_ids: int = 0
    held_out_prompts: int | None = None
    named: dict[str, list[str]] = Field(default_factory=dict)
    warnings: list[str] = Field(default_factory=list)
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
    held_out: Sequence[DataSource] = (),
    write: Callable[[Mapping[str, Any]], None] | None = None,
    on_bytes: OnBytes | None = None,
) -> DataReport:
    """Reads all data and reports what it contains and which rows cannot be used.

    Args:
        sources: The data.
        template: Measures lengths in tokens and truncation. Without it lengths are in characters.
        held_out: Data whose prompts must not be among the others.
        write: Called with each row that is good: it can be used, its prompt is not held out, and at least
            one of its pairs has two different texts, no empty one, and is neither a duplicate nor contradicts
            an earlier pair.
        on_bytes: See `polar_ft.data.reading.read_rows`.

    Raises:
        PolarError: A file does not exist.
    """
    lint = _Lint(sources, template)
    problems = lint.report.problems
    if held_out:
        lint.report.held_out_prompts = 0
        lint.held_out = {
            prompt_key(example.prompt) for example in read_examples(held_out, on_problem=problems.append)
        }
    rows: deque[Mapping[str, Any]] = deque()  # of the examples that are being encoded

    def examples() -> Iterator[Example]:
        for source in sources:
            for row, example in parsed_rows(source, on_bytes=on_bytes):
                if isinstance(example, RowProblem):
                    problems.append(example)
                else:
                    rows.append(row)
                    yield example

    for source in sources:
        expand(source.path)  # so that a missing file is named before anything is read
    for example, encoded in _encode(examples(), template):
        row = rows.popleft()
        if isinstance(encoded, RowProblem):
            problems.append(encoded)
        elif lint.add(example, encoded) and write is not None:
            write(row)
    return lint.finish()


class _Lint:
    """Counts of a pass. Of texts 8 bytes of their hash are kept, about 200 bytes of memory per pair."""

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
        self.seen_pairs: dict[int, tuple[int, int]] = {}  # file and line of the first
        self.seen_ids: set[int] = set()
        self.held_out: set[int] = set()
        self.prompt_files: dict[int, int] = {}
        self.files: dict[str, int] = {}
        self.file_names: list[str] = []

    def add(self, example: Example, encoded: TokenGroup | None) -> bool:
        """Counts an example; returns whether it is good, see `check`."""
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

        file, _, line = example.source.rpartition(":")
        file_number = self.files.setdefault(file, len(self.files))
        if file_number == len(self.file_names):
            self.file_names.append(file)
        bit = 1 << file_number
        prompt = _hash(example.prompt)
        self.prompt_files[prompt] = self.prompt_files.get(prompt, 0) | bit

        if encoded is None or encoded.lengths is None:
            prompt_length, reference_length = len(example.prompt), len(example.reference)
            candidate_lengths: Sequence[int] = [len(text) for text in example.candidates]
        else:
            prompt_length, reference_length = encoded.lengths.prompt, encoded.lengths.reference
            candidate_lengths = encoded.lengths.candidates
        cut = None if encoded is None else encoded.cut
        good = self._check_names(example)
        self._measure("prompt", example.prompt, prompt_length, cut.prompt if cut else 0)
        self._measure("reference", example.reference, reference_length, cut.reference if cut else 0)
        pairs_good = False
        for name, text in (("prompt", example.prompt), *_texts_of_pairs(example)):
            if not text:
                self._name("empty", f"{example.source} ({name})")
        for chosen, rejected in example.pairs:
            for name, i in (("chosen", chosen), ("rejected", rejected)):
                tokens_cut = cut.candidates[i] if cut else 0
                self._measure(name, example.candidates[i], candidate_lengths[i], tokens_cut)
                if encoded is not None:
                    self.lengths["sequence"][len(encoded.prefix) + len(encoded.branches[i])] += 1
            report.chosen_longer += candidate_lengths[chosen] > candidate_lengths[rejected]
            report.chosen_shorter += candidate_lengths[chosen] < candidate_lengths[rejected]
            pairs_good |= self._compare(example, chosen, rejected, encoded, (file_number, int(line)))
        return good and pairs_good

    def _check_names(self, example: Example) -> bool:
        """Whether neither the prompt is held out, nor the id that of another row."""
        if example.id != example.source:
            name = _hash(example.id)
            if name in self.seen_ids:
                self.report.repeated_ids += 1
                self._name("repeated_ids", f"{example.source} ({example.id})")
            self.seen_ids.add(name)
        if self.report.held_out_prompts is None or prompt_key(example.prompt) not in self.held_out:
            return True
        self.report.held_out_prompts += 1
        self._name("held_out_prompts", example.source)
        return False

    def _name(self, finding: str, row: str) -> None:
        named = self.report.named.setdefault(finding, [])
        if len(named) < NAMED and row not in named[-1:]:
            named.append(row)

    def _measure(self, name: str, text: str, length: int, cut: int) -> None:
        self.lengths[name][length] += 1
        self.report.empty[name] += not text
        if cut:
            self.report.truncated[name].count += 1
            self.report.truncated[name].tokens += cut

    def _compare(
        self,
        example: Example,
        chosen: int,
        rejected: int,
        encoded: TokenGroup | None,
        place: tuple[int, int],
    ) -> bool:
        """Counts what a pair has in common with itself and with earlier ones; returns whether it is good."""
        report = self.report
        better, worse = example.candidates[chosen], example.candidates[rejected]
        if better == worse:
            report.chosen_equals_rejected += 1
            self._name("chosen_equals_rejected", example.source)
        if example.reference:  # equal empty texts do not suggest a mistake
            report.reference_equals_chosen += example.reference == better
            report.reference_equals_rejected += example.reference == worse
        if encoded is not None and report.chosen_equals_rejected_after_truncation is not None:
            same = np.array_equal(encoded.branches[chosen], encoded.branches[rejected])
            report.chosen_equals_rejected_after_truncation += same
        pair = _hash(example.prompt, example.reference, better, worse)
        exchanged = _hash(example.prompt, example.reference, worse, better)
        first = self.seen_pairs.setdefault(pair, place)
        duplicate = first is not place
        if duplicate:
            report.duplicate_pairs += 1
            self._name("duplicate_pairs", f"{example.source} (as {self._place(first)})")
        opposite = self.seen_pairs.get(exchanged) if better != worse else None
        if opposite is not None:
            report.contradictory_pairs += 1
            self._name("contradictory_pairs", f"{example.source} (against {self._place(opposite)})")
        return (
            bool(better and worse and example.prompt)
            and better != worse
            and not duplicate
            and opposite is None
        )

    def _place(self, place: tuple[int, int]) -> str:
        file, line = place
        return f"{self.file_names[file]}:{line}"

    def finish(self) -> DataReport:
        report = self.report
        report.bad_rows = len(report.problems)
        report.prompts = len(self.prompt_files)
        report.prompts_in_several_files = sum(bits.bit_count() > 1 for bits in self.prompt_files.values())
        report.lengths = {name: summarize(lengths) for name, lengths in self.lengths.items()}
        unequal = report.chosen_longer + report.chosen_shorter
        if unequal >= 20 and report.chosen_longer > LONGER_WINS_TOO_OFTEN * unequal:
            share = report.chosen_longer / unequal
            report.warnings.append(
                f"the longer answer is the chosen one in {share:.1%} of the pairs of unequal length: a model "
                f"can learn length from them instead of quality"
            )
        return report


def _texts_of_pairs(example: Example) -> list[tuple[str, str]]:
    """Name and text of each candidate that is in a pair.

    >>> _texts_of_pairs(Example("Q", ("R",), ("A", "B"), pairs=((0, 1),)))
    [('chosen', 'A'), ('rejected', 'B')]
    """
    return [
        (name, example.candidates[i])
        for pair in example.pairs
        for name, i in zip(("chosen", "rejected"), pair, strict=True)
    ]


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
    iterator = batches(examples, BATCH)
    workers = min(8, os.cpu_count() or 1)
    pending: deque[Future[Measured]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        while True:
            while len(pending) < 2 * workers and (batch := next(iterator, None)):
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
