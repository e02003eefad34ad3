"""Scores and token counts of examples, chunk by chunk, longest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from polar_ft.data.records import Example
from polar_ft.errors import PolarError
from polar_ft.template import Cut, Encoded, Lengths, PolarTemplate

Result = TypeVar("Result")
OnChunk = Callable[[Sequence[Example]], None]

# Characters that go to the scorer at once: some 50k tokens, a few of its batches. Small enough for a progress
# bar that moves, large enough that the last, partly filled batch of a chunk costs little.
CHUNK_CHARS = 200_000


class Scorer(Protocol):
    """Whatever gives rewards: the model in this process, later an engine behind HTTP."""

    @property
    def template(self) -> PolarTemplate:
        """The template that turns the examples into the scorer's input."""

    @property
    def dtype(self) -> object:
        """In which dtype it computes; its `str` is written into reports, as that of `device`."""

    @property
    def device(self) -> object:
        """Where it computes."""

    def score_examples(self, examples: list[Example]) -> list[list[float]]:
        """A reward for each candidate of each example, `[examples][candidates]`, in the order given."""


@dataclass(frozen=True)
class FieldTokens:
    """Tokens of each field of an example before cutting, and how many of them were cut off."""

    lengths: Lengths
    cut: Cut


def example_chars(example: Example) -> int:
    """Characters that a scorer reads for an example, a measure of its work.

    The candidates share what stands before them: prompt, reference and the prompt once more.
    """
    return 2 * len(example.prompt) + len(example.reference) + sum(map(len, example.candidates))


def score_all(
    scorer: Scorer, examples: Sequence[Example], *, on_chunk: OnChunk | None = None
) -> list[list[float]]:
    """Scores every candidate of every example.

    Args:
        scorer: Gives the rewards.
        examples: What to score, in any order: the longest are scored first, so that a batch holds texts of
            like length and running out of memory happens at the start.
        on_chunk: Called with the examples of each chunk once they are scored.

    Returns:
        A reward for each candidate, `[examples][candidates]`, in the order of `examples`.
    """
    return _by_chunks(scorer.score_examples, examples, on_chunk)


def count_tokens(
    template: PolarTemplate, examples: Sequence[Example], *, on_chunk: OnChunk | None = None
) -> list[FieldTokens]:
    """Counts the tokens of every field, before cutting and cut off.

    It takes a small part of the time that scoring takes, and run before it, it finds every row that the
    model's limits have no room for before the first one is scored.

    Args:
        template: The scorer's template.
        examples: What is to be scored.
        on_chunk: Called with the examples of each chunk once they are counted.

    Returns:
        The counts of each example, `[examples]`.

    Raises:
        PolarError: A row does not fit; the message names it.
    """

    def count(chunk: list[Example]) -> list[FieldTokens]:
        return [_field_tokens(encoded) for encoded in _encode(template, chunk)]

    return _by_chunks(count, examples, on_chunk)


def _encode(template: PolarTemplate, chunk: list[Example]) -> list[Encoded]:
    try:
        return template.encode_batch(
            [(example.prompt, example.reference, example.candidates, example.wrapper) for example in chunk],
            measure=True,
        )
    except PolarError as error:
        if len(chunk) == 1:
            raise PolarError(f"{chunk[0].source}: {error}") from error
        # The template knows texts, not rows: one by one shows which row it is.
        return [encoded for example in chunk for encoded in _encode(template, [example])]


def _field_tokens(encoded: Encoded) -> FieldTokens:
    assert encoded.lengths is not None, "encode_batch(measure=True) gives lengths"
    return FieldTokens(encoded.lengths, encoded.cut)


def _by_chunks(
    work: Callable[[list[Example]], list[Result]], examples: Sequence[Example], on_chunk: OnChunk | None
) -> list[Result]:
    """Applies `work` to chunks of the examples, longest first; results in the order of `examples`."""
    by_row: dict[int, Result] = {}
    for rows in _chunks(examples):
        chunk = [examples[row] for row in rows]
        by_row.update(zip(rows, work(chunk), strict=True))
        if on_chunk is not None:
            on_chunk(chunk)
    return [by_row[row] for row in range(len(examples))]


def _chunks(examples: Sequence[Example]) -> Iterator[list[int]]:
    chars = [example_chars(example) for example in examples]
    rows: list[int] = []
    size = 0
    for row in sorted(range(len(examples)), key=lambda row: -chars[row]):
        rows.append(row)
        size += chars[row]
        if size >= CHUNK_CHARS:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows
