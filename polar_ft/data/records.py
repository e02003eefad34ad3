"""Rows of preference data: their forms, their checks, and the `Example` that all further code uses.

A row is a JSON object in one of two forms::

    {"prompt": ..., "reference": ..., "chosen": ..., "rejected": ...}                         a pair
    {"prompt": ..., "responses": [{"content": ..., "score": ...}, ...], "reference": ...}     ranked

Instead of ``"reference"`` a row may have ``"references"``, a list of several: evaluation scores against all
of them, training against the first. A prompt, reference or response is a string, or a list of ``{"role",
"content"}`` messages. Both forms become an `Example`: the texts of one (prompt, reference) with its
candidates, and the pairs of them. Unknown fields are kept for reports.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from polar_ft.data.messages import plain_message
from polar_ft.errors import PolarError
from polar_ft.groups import Pairing, TextGroup, Wrapper

# Tokenizing takes up to a kilobyte of memory for a character. A million characters are 16 times what a POLAR
# model reads, at four characters a token.
MAX_CHARS = 2**20
BATCH_CHARS = 2**20


class RowError(PolarError):
    """A row that cannot be used.

    Attributes:
        field: The field of the row, e.g. ``chosen[0].role``; empty for the row itself.
        reason: What is wrong and what to do.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}" if field else reason)
        self.field = field
        self.reason = reason


class _Strict(BaseModel):
    # Strict: a number in place of a text is a mistake in the data and is not converted silently.
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


def _whole_characters(text: str) -> str:
    # JSON can spell half of a character, which no tokenizer accepts and UTF-8 cannot represent.
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(
                r"holds half of a surrogate pair (such as \ud83d) — write the complete character"
            ) from None
    return text


PlainText = Annotated[str, AfterValidator(_whole_characters)]


class Message(_Strict):
    """One turn of a dialogue, as `plain_message` reads it. The model reads the content; the role is kept."""

    role: PlainText
    content: PlainText

    _plain = model_validator(mode="before")(plain_message)


def _text_form(value: Any) -> str | None:
    if isinstance(value, str):
        return "string"
    return "messages" if isinstance(value, list) else None


Text = Annotated[
    Annotated[PlainText, Tag("string")] | Annotated[list[Message], Tag("messages")],
    Discriminator(_text_form),
]


def text_of(value: str | Sequence[Message]) -> str:
    r"""The text of a field: the contents of its messages, joined with ⏎ as in xtuner 0.2.0.

    >>> text_of([Message(role="user", content="Hi"), Message(role="assistant", content="Hello")])
    'Hi\nHello'
    >>> text_of("Hi")
    'Hi'
    """
    return value if isinstance(value, str) else "\n".join(message.content for message in value)


@dataclass(frozen=True, slots=True)
class Example(TextGroup):
    """A `TextGroup` with the further fields of its row.

    Attributes:
        id: The row's own id, else its source.
        subset: The part of the data to which the row belongs, for reports.
        extra: Unknown fields of the row.
        source: "file:line" (a row's number in Parquet and data sets), from 1.
        n_ties: Number of pairs that were dropped because both candidates are ranked the same.
        candidate_info: For each candidate of a ranked row what the row says of it next to its text
            (policy, score or rank, unknown fields); empty for a pair row.
        reference_info: The same for the response that became the reference.
    """

    id: str = ""
    subset: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    n_ties: int = 0
    candidate_info: tuple[dict[str, Any], ...] = ()
    reference_info: dict[str, Any] = field(default_factory=dict)


class _Row(_Strict):
    prompt: Text
    id: PlainText | int | None = None
    subset: PlainText | None = None
    weight: float = Field(default=1.0, gt=0)
    wrapper: Wrapper = "sft"
    references: list[Text] | None = None

    def _texts_of_references(self, reference: str | Sequence[Message]) -> tuple[str, ...]:
        """The texts of ``references``, or the given reference if the row has no such list."""
        return tuple(map(text_of, self.references)) if self.references else (text_of(reference),)

    def _name(self, source: str) -> str:
        return source if self.id is None else str(self.id)


class PairRow(_Row):
    """A prompt, one or several references (which may be empty), a better and a worse response.

    >>> row = parse_row({"prompt": "2 + 2?", "reference": "4", "chosen": "four", "rejected": "five"})
    >>> example = row.to_example("pairs.jsonl:1")
    >>> example.candidates, example.pairs
    (('four', 'five'), ((0, 1),))
    >>> row = parse_row({"prompt": "2 + 2?", "references": ["4", "IV"], "chosen": "four", "rejected": "five"})
    >>> example = row.to_example("pairs.jsonl:2")
    >>> example.references
    ('4', 'IV')
    """

    reference: Text
    chosen: Text
    rejected: Text
    margin: float | None = None

    def to_example(self, source: str, *, pairing: Pairing = "adjacent", weight: float = 1.0) -> Example:
        """Makes an `Example` of one pair.

        Args:
            source: "file:line" of the row.
            pairing: Ignored; ranked rows have the same argument.
            weight: Factor on the row's own weight.
        """
        return Example(
            prompt=text_of(self.prompt),
            references=self._texts_of_references(self.reference),
            candidates=(text_of(self.chosen), text_of(self.rejected)),
            pairs=((0, 1),),
            margins=(self.margin,),
            weights=(self.weight * weight,),
            wrapper=self.wrapper,
            id=self._name(source),
            subset=self.subset,
            extra=dict(self.model_extra or {}),
            source=source,
        )


class Response(_Strict):
    """One response of a ranked row, with a score (higher is better) or a rank (1 is best)."""

    content: PlainText | None = None
    messages: list[Message] | None = None
    score: float | None = None
    rank: float | None = None
    policy: str | None = None

    @model_validator(mode="after")
    def _has_one_text_and_one_order(self) -> Response:
        if (self.content is None) == (self.messages is None):
            raise ValueError('must have either "content" (a string) or "messages"')
        if (self.score is None) == (self.rank is None):
            raise ValueError('must have either "score" (higher is better) or "rank" (1 is best)')
        return self

    @property
    def text(self) -> str:
        """The text of the response."""
        if self.messages is not None:
            return text_of(self.messages)
        return self.content or ""

    @property
    def goodness(self) -> float:
        """The score, or the negative rank: higher is better."""
        return self.score if self.score is not None else -(self.rank or 0.0)

    def info(self) -> dict[str, Any]:
        """The fields of the response except its text.

        >>> Response(content="four", score=0.9, policy="small-lm").info()
        {'score': 0.9, 'policy': 'small-lm'}
        """
        return self.model_dump(exclude={"content", "messages"}, exclude_none=True)


@dataclass(frozen=True, slots=True)
class RankedPairs:
    """The pairs of a ranked row.

    Attributes:
        reference: The response that became the reference; None if the row has its own reference.
        candidates: The other responses, in the order of the row.
        pairs: (chosen, rejected) as indices into ``candidates``.
        margins: Score differences of the pairs, None for ranks.
        n_ties: Number of pairs that were dropped because both are ranked the same.
    """

    reference: Response | None
    candidates: list[Response]
    pairs: list[tuple[int, int]]
    margins: list[float | None]
    n_ties: int


class RankedRow(_Row):
    """A prompt with several ranked responses; without a reference the best response becomes the reference.

    >>> responses = [{"content": text, "score": score} for text, score in
    ...              [("C", 1), ("A", 3), ("B", 2), ("b", 2)]]
    >>> row = parse_row({"prompt": "Which?", "responses": responses})
    >>> example = row.to_example("ranked.jsonl:1", pairing="all")
    >>> example.reference, example.candidates
    ('A', ('C', 'B', 'b'))
    >>> example.pairs, example.margins, example.n_ties
    (((1, 0), (2, 0)), (1.0, 1.0), 1)
    """

    responses: list[Response]
    reference: Text | None = None

    @model_validator(mode="after")
    def _can_be_compared(self) -> RankedRow:
        if len({response.score is None for response in self.responses}) > 1:
            raise ValueError("some responses have a score and others a rank; use one of them for all")
        needed = 2 if self.reference is not None else 3
        if len(self.responses) < needed:
            why = "a pair" if needed == 2 else "a reference (the best one, as the row has none) and a pair"
            raise ValueError(f"has {len(self.responses)} responses; {why} needs at least {needed}")
        return self

    def ranking(self, pairing: Pairing = "adjacent") -> RankedPairs:
        """Orders the responses and pairs them.

        Args:
            pairing: "adjacent" pairs every response with the next worse one, "all" with every worse one.
        """
        candidates = list(self.responses)
        reference = None
        if self.reference is None:
            # Of several equally good ones max() takes the first.
            reference = max(candidates, key=lambda response: response.goodness)
            candidates = [response for response in candidates if response is not reference]

        order = sorted(range(len(candidates)), key=lambda i: -candidates[i].goodness)
        reach = 1 if pairing == "adjacent" else len(order)
        compared = [(a, b) for at, a in enumerate(order) for b in order[at + 1 : at + 1 + reach]]
        pairs = [(a, b) for a, b in compared if candidates[a].goodness != candidates[b].goodness]
        margins: list[float | None] = [
            None if candidates[a].score is None else candidates[a].goodness - candidates[b].goodness
            for a, b in pairs
        ]
        return RankedPairs(reference, candidates, pairs, margins, n_ties=len(compared) - len(pairs))

    def to_example(self, source: str, *, pairing: Pairing = "adjacent", weight: float = 1.0) -> Example:
        """Makes an `Example` of the row; ties are dropped and counted.

        Args:
            source: "file:line" of the row.
            pairing: "adjacent" or "all"; see `ranking`.
            weight: Factor for the row's own weight.
        """
        ranking = self.ranking(pairing)
        best = ranking.reference
        own = best.text if best is not None else self.reference or ""
        return Example(
            prompt=text_of(self.prompt),
            references=self._texts_of_references(own),
            candidates=tuple(response.text for response in ranking.candidates),
            pairs=tuple(ranking.pairs),
            margins=tuple(ranking.margins),
            weights=(self.weight * weight,) * len(ranking.pairs),
            wrapper=self.wrapper,
            id=self._name(source),
            subset=self.subset,
            extra=dict(self.model_extra or {}),
            source=source,
            n_ties=ranking.n_ties,
            candidate_info=tuple(response.info() for response in ranking.candidates),
            reference_info=best.info() if best is not None else {},
        )


def parse_row(row: Any) -> PairRow | RankedRow:
    """Checks a row and parses it as a pair row or a ranked row.

    Args:
        row: A JSON object. With ``"responses"`` it is a ranked row.

    Raises:
        RowError: The row cannot be used; the message names the field, the reason and what to do.

    >>> parse_row({"prompt": "Hi", "reference": "", "chosen": "Hello", "rejected": 7})
    Traceback (most recent call last):
    ...
    polar_ft.data.records.RowError: rejected: is the number 7 — must be a string or a list of messages
    """
    if not isinstance(row, Mapping):
        raise RowError("", f"the row is {describe(row)} — write one JSON object a line")
    for key in row:
        try:
            _whole_characters(key)
        except ValueError as error:
            raise RowError(key, str(error)) from None
    both = {"chosen", "rejected"} & row.keys() if "responses" in row else set()
    if both:
        others = " and ".join(sorted(both))
        raise RowError("responses", f"is given together with {others} — keep one of the two forms")
    # In Parquet every row has every column: null says that an optional field is missing.
    fields = {key: value for key, value in row.items() if value is not None or key not in _HAVE_DEFAULTS}
    if row.get("references") is not None:
        if row.get("reference") is not None:
            raise RowError("references", 'is given together with "reference" — keep one of the two fields')
        if row["references"] == []:
            raise RowError("references", 'is an empty list — "reference": "" says that there is none')
        # `references` has the texts; with a reference, no response of a ranked row becomes one.
        fields["reference"] = ""
    model: type[PairRow | RankedRow] = RankedRow if "responses" in row else PairRow
    try:
        checked = model.model_validate(fields)
    except ValidationError as error:
        raise _row_error(error, row) from None
    for name, text in _texts(checked):
        chars = len(text) if isinstance(text, str) else sum(len(message.content) for message in text)
        if chars > MAX_CHARS:
            reason = f"has {chars:,} characters, and no model reads so many; cut it to {MAX_CHARS:,} at most"
            raise RowError(name, reason)
    return checked


def _texts(row: PairRow | RankedRow) -> Iterator[tuple[str, str | Sequence[Message]]]:
    """The texts of a row with their places."""
    yield "prompt", row.prompt
    if row.reference is not None:
        yield "reference", row.reference
    for number, reference in enumerate(row.references or ()):
        yield f"references[{number}]", reference
    if isinstance(row, PairRow):
        yield from (("chosen", row.chosen), ("rejected", row.rejected))
    else:
        yield from (
            (f"responses[{number}]", response.messages or response.content or "")
            for number, response in enumerate(row.responses)
        )


def batches(examples: Iterable[Example], rows: int) -> Iterator[list[Example]]:
    """Batches of at most so many examples and (but for a single one) `BATCH_CHARS` characters."""
    batch: list[Example] = []
    chars = 0
    for example in examples:
        more = sum(map(len, (example.prompt, *example.references, *example.candidates)))
        if batch and (len(batch) == rows or chars + more > BATCH_CHARS):
            yield batch
            batch, chars = [], 0
        batch.append(example)
        chars += more
    if batch:
        yield batch


_HAVE_DEFAULTS = ("weight", "wrapper")

_MUST_BE = {
    "string_type": "a string",
    "list_type": "a list",
    "model_type": 'an object with "role" and "content"',
    "float_type": "a number",
    "union_tag_not_found": "a string or a list of messages",
    "union_tag_invalid": "a string or a list of messages",
    "literal_error": '"sft" or "pretrain"',
    "greater_than": "greater than 0",
    "finite_number": "a finite number",
}


def _row_error(error: ValidationError, row: Mapping[str, Any]) -> RowError:
    """Makes one error of all that is wrong in a row: the first in full, then the names of the others."""
    reasons: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        # Errors of the row itself are always about the number and order of its responses.
        path = _path(problem["loc"], row) or "responses"
        reasons.setdefault(path, _reason(problem, path, row))
    (first, reason), *others = reasons.items()
    if others:
        more = ", ".join(path for path, _ in others[:4]) + (", …" if len(others) > 4 else "")
        reason += f" (also wrong: {more})"
    return RowError(first, reason)


def _path(loc: tuple[int | str, ...], row: Any) -> str:
    """The path to an error in the row; pydantic's names for the arms of a union are omitted.

    >>> _path(("chosen", "messages", 0, "role"), {"chosen": [{"role": 1}]})
    'chosen[0].role'
    """
    path, here = "", row
    for step, key in enumerate(loc):
        if isinstance(here, Mapping) and key in here:
            path, here = f"{path}.{key}", here[key]
        elif isinstance(here, list) and isinstance(key, int) and key < len(here):
            path, here = f"{path}[{key}]", here[key]
        elif isinstance(here, Mapping) and step == len(loc) - 1:  # a field that is missing
            path = f"{path}.{key}"
    return path.lstrip(".")


def _reason(problem: Any, path: str, row: Mapping[str, Any]) -> str:
    kind = problem["type"]
    if kind == "missing":
        return _reason_missing(path, row)
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    must_be = _MUST_BE.get(kind)
    if path == "id":
        must_be = "a string or a whole number"
    elif kind == "model_type" and path.startswith("responses") and path.count("[") == 1:
        must_be = 'an object with "content" and "score" or "rank"'
    if must_be is None:
        return str(problem["msg"])
    return f"is {describe(problem['input'])} — must be {must_be}"


def _reason_missing(path: str, row: Mapping[str, Any]) -> str:
    dialogue = row.get("chosen")
    if path == "prompt" and isinstance(dialogue, str) and dialogue.lstrip().startswith("Human:"):
        return "is missing — an hh-rlhf dialogue becomes a row with `polar-ft data convert hh-rlhf`"
    known = {"prompt", "reference", "chosen", "rejected", "responses"}
    unknown = [key for key in row if key not in known]
    close = difflib.get_close_matches(path, unknown, n=1, cutoff=0.75)
    if close:
        return f"is missing — the row has {close[0]!r}; rename it"
    if path == "reference":
        return 'is missing — add it; "reference": "" says that there is none'
    return "is missing — add it"


def describe(value: Any) -> str:
    """Describes a wrong value in a few words, whatever its size.

    >>> describe(None), describe(7), describe([1, 2]), describe({"text": "x"}), describe("a" * 99)[:26]
    ('null', 'the number 7', 'a list of 2', "an object with 'text'", "the string 'aaaaaaaaaaaaaa")
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"the number {value!r:.24}" if isinstance(value, float) else f"the number {value}"[:40]
    if isinstance(value, str):
        return f"the string {value[:40]!r}{'…' if len(value) > 40 else ''}"
    if isinstance(value, Mapping):
        keys = ", ".join(repr(key) for key in list(value)[:4])
        return f"an object with {keys}" if keys else "an empty object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return f"a {type(value).__name__}"
