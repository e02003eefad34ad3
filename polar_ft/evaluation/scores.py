"""`scores.jsonl`: one row for each scored pair, with all that a figure or a plot needs, texts excepted."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from polar_ft.data.records import Example
from polar_ft.data.writing import to_line
from polar_ft.evaluation.evaluator import FieldTokens


class CutTokens(BaseModel):
    """Tokens cut off each field of a pair; 0 where the field is whole."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: int
    reference: int
    chosen: int
    rejected: int

    def __bool__(self) -> bool:
        return bool(self.prompt or self.reference or self.chosen or self.rejected)


class ShuffledScores(BaseModel):
    """Scores of the same pair with another row's reference.

    Attributes:
        chosen_score: Reward of the chosen candidate.
        rejected_score: Reward of the rejected candidate.
        reference_from: `source` of the row that the reference was taken from.
        same_reference: Whether that reference has the same text as the row's own, so that nothing changed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    chosen_score: float
    rejected_score: float
    reference_from: str
    same_reference: bool


class ScoredPair(BaseModel):
    """One pair with its scores: a row of `scores.jsonl`.

    A score that is NaN or infinite is written as the string "NaN", "Infinity" or "-Infinity", which keeps
    the file strict JSON, and is read back as the number.

    Attributes:
        id: The row's id.
        pair: Which two candidates of the row, chosen first; always 0, 1 where the row is one pair.
        source: "file:line" of the row.
        subset: The row's subset, None where it has none.
        prompt_id: A hash of the prompt's text; equal for all pairs of one prompt.
        chosen_score: Reward of the chosen candidate.
        rejected_score: Reward of the rejected candidate.
        margin: `chosen_score` − `rejected_score`.
        chosen_chars: Characters of the chosen candidate's text before anything was cut; likewise rejected.
        prompt_tokens: Tokens of the prompt before anything was cut, BOS included; likewise the others.
        cut: Tokens cut off each field.
        shuffled_reference: Scores with another row's reference, where they were asked for.
        chosen_info: What a ranked row says of the chosen candidate (policy, score or rank, …); else empty.
        rejected_info: The same for the rejected one.
        extra: Fields of the row that polar_ft does not know, as they came.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    pair: tuple[int, int]
    source: str
    subset: str | None
    prompt_id: str
    chosen_score: float
    rejected_score: float
    margin: float
    chosen_chars: int
    rejected_chars: int
    prompt_tokens: int
    reference_tokens: int
    chosen_tokens: int
    rejected_tokens: int
    cut: CutTokens
    shuffled_reference: ShuffledScores | None = None
    chosen_info: dict[str, Any] = {}
    rejected_info: dict[str, Any] = {}
    extra: dict[str, Any] = {}


def to_json_line(row: ScoredPair) -> bytes:
    """The row as a line of `scores.jsonl`; `ScoredPair.model_validate_json` reads it back.

    Extra fields may be anything that data holds: what JSON has no word for becomes a string.
    """
    return to_line(_strict_json(row.model_dump()))


def _strict_json(value: Any) -> Any:
    """The value with "NaN", "Infinity" and "-Infinity" as strings.

    >>> _strict_json({"score": float("-inf"), "list": [1.5, float("nan")]})
    {'score': '-Infinity', 'list': [1.5, 'NaN']}
    """
    if isinstance(value, dict):
        return {key: _strict_json(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_strict_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def scored_pairs(
    examples: Sequence[Example],
    scores: Sequence[Sequence[float]],
    tokens: Sequence[FieldTokens],
    *,
    shuffled_scores: Sequence[Sequence[float]] | None = None,
    reference_sources: Sequence[int] | None = None,
) -> Iterator[ScoredPair]:
    """Takes the candidates' scores apart into pairs, in the order of the data.

    Args:
        examples: What was scored, `[examples]`.
        scores: A reward for each candidate of each example, `[examples][candidates]`.
        tokens: Token counts of each example, `[examples]`.
        shuffled_scores: Rewards with other rows' references, `[examples][candidates]`, with
        reference_sources: the number of the example that each reference was taken from, `[examples]`.
    """
    for i, example in enumerate(examples):
        lengths, cut = tokens[i].lengths, tokens[i].cut
        info = example.candidate_info or ({},) * len(example.candidates)
        for chosen, rejected in example.pairs:
            shuffled = None
            if shuffled_scores is not None and reference_sources is not None:
                other = examples[reference_sources[i]]
                shuffled = ShuffledScores(
                    chosen_score=shuffled_scores[i][chosen],
                    rejected_score=shuffled_scores[i][rejected],
                    reference_from=other.source,
                    same_reference=other.reference == example.reference,
                )
            yield ScoredPair(
                id=example.id,
                pair=(chosen, rejected),
                source=example.source,
                subset=example.subset,
                prompt_id=hashlib.sha256(example.prompt.encode()).hexdigest()[:16],
                chosen_score=scores[i][chosen],
                rejected_score=scores[i][rejected],
                margin=scores[i][chosen] - scores[i][rejected],
                chosen_chars=len(example.candidates[chosen]),
                rejected_chars=len(example.candidates[rejected]),
                prompt_tokens=lengths.prompt,
                reference_tokens=lengths.reference,
                chosen_tokens=lengths.candidates[chosen],
                rejected_tokens=lengths.candidates[rejected],
                cut=CutTokens(
                    prompt=cut.prompt,
                    reference=cut.reference,
                    chosen=cut.candidates[chosen],
                    rejected=cut.candidates[rejected],
                ),
                shuffled_reference=shuffled,
                chosen_info=info[chosen],
                rejected_info=info[rejected],
                extra=example.extra,
            )
