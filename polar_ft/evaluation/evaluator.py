"""Scores and token counts of examples, chunk by chunk, longest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from polar_ft.data.records import Example
from polar_ft.errors import PolarError
from polar_ft.groups import FieldLengths, TokenGroup, against
from polar_ft.template import EncodeError, PolarTemplate

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

    lengths: FieldLengths
    cut: FieldLengths


def score_references(
    scorer: Scorer, examples: Sequence[Example], references: Sequence[Sequence[str]]
) -> list[dict[str, list[float]]]:
    """Scores every candidate of every example against several references, in one call of the scorer.

    Args:
        scorer: Gives the rewards.
        examples: What to score; their own references are of no effect.
        references: Of each example the references to score it against, `[examples][references]`.

    Returns:
        For each example reference → a reward for each candidate.

    Raises:
        ValueError: The scorer lost rows.
    """
    requests = [
        request
        for example, texts in zip(examples, references, strict=True)
        for request in requests_against(example, texts)
    ]
    scores = scorer.score_examples(requests)
    if len(scores) != len(requests):
        raise ValueError(f"the scorer gave rewards for {len(scores)} of {len(requests)} rows")
    rest = iter(scores)
    return [{text: next(rest) for text in texts} for texts in references]


def requests_against(example: Example, references: Sequence[str]) -> list[Example]:
    """What a scorer is asked for: the row against each reference, `[references]`."""
    return [against(example, text) for text in references]


def count_tokens(
    template: PolarTemplate, examples: Sequence[Example], *, on_chunk: OnChunk | None = None
) -> list[FieldTokens]:
    """Counts the tokens of every field, before cutting and cut off.

    It takes a small part of the time that scoring takes, and run before it, it finds every row that the
    model's limits have no room for before the first one is scored.

    Args:
        template: The scorer's template.
        examples: What is to be scored; of several references of a row the longest counts.
        on_chunk: Called with the examples of each chunk once they are counted.

    Returns:
        The counts of each example, `[examples]`.

    Raises:
        PolarError: A row does not fit; the message names it.
    """

    def count(chunk: list[Example]) -> list[FieldTokens]:
        each = [request for e in chunk for request in requests_against(e, e.references)]
        counts = map(_field_tokens, encode_examples(template, each, measure=True))
        return [_longest([next(counts) for _ in e.references]) for e in chunk]

    return _by_chunks(count, examples, on_chunk)


def encode_examples(
    template: PolarTemplate, examples: Sequence[Example], *, measure: bool = False
) -> list[TokenGroup]:
    """The examples as the model sees them.

    Args:
        template: The model's template.
        examples: What is to be scored.
        measure: Also count the tokens of each field before cutting.

    Raises:
        PolarError: A row does not fit the model's limits; the message names it.
    """
    try:
        return template.encode(examples, measure=measure)
    except EncodeError as error:
        raise PolarError(f"{examples[error.index].source}: {error}") from error


def _longest(counts: Sequence[FieldTokens]) -> FieldTokens:
    """Of the counts of one row with several references those of the longest, and the most that was cut."""
    first = counts[0]
    return FieldTokens(
        replace(first.lengths, reference=max(count.lengths.reference for count in counts)),
        replace(
            first.cut,
            prompt=max(count.cut.prompt for count in counts),
            reference=max(count.cut.reference for count in counts),
            candidates=tuple(map(max, zip(*(count.cut.candidates for count in counts), strict=True))),
        ),
    )


def _field_tokens(encoded: TokenGroup) -> FieldTokens:
    assert encoded.lengths is not None, "encode(measure=True) gives lengths"
    return FieldTokens(encoded.lengths, encoded.cut)


def _by_chunks(
    work: Callable[[list[Example]], list[Result]], examples: Sequence[Example], on_chunk: OnChunk | None
) -> list[Result]:
    """Applies `work` to chunks of the examples, longest first; results in the order of `examples`."""
    by_row: dict[int, Result] = {}
    for rows in chunks(examples):
        chunk = [examples[row] for row in rows]
        by_row.update(zip(rows, work(chunk), strict=True))
        if on_chunk is not None:
            on_chunk(chunk)
    return [by_row[row] for row in range(len(examples))]


def chunks(examples: Sequence[Example]) -> Iterator[list[int]]:
    """Row numbers of the examples, the longest first, cut into chunks of about `CHUNK_CHARS` characters."""
    chars = [example.characters for example in examples]
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
