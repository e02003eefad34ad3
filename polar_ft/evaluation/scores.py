"""What a run keeps of its scores: a line of `scores.jsonl` a pair, of `rankings.jsonl` a ranked row.

They have all that a figure or a plot needs, texts excepted.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from polar_ft.data.records import Example
from polar_ft.data.writing import to_line
from polar_ft.evaluation.evaluator import FieldTokens
from polar_ft.evaluation.references import RowReferences

DEFAULT_OUT = Path("work_dirs/eval")
SCORES_FILE = "scores.jsonl"
RANKINGS_FILE = "rankings.jsonl"


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PairCut(_Row):
    """Tokens cut off each field of a pair; 0 where the field was not cut."""

    prompt: int
    reference: int
    chosen: int
    rejected: int

    def __bool__(self) -> bool:
        return bool(self.prompt or self.reference or self.chosen or self.rejected)


class ReferenceScores(_Row):
    """Scores of a pair against one reference."""

    chosen_score: float
    rejected_score: float


class ShuffledScores(ReferenceScores):
    """Scores of the same pair with another row's reference.

    Attributes:
        reference_from: `source` of the row that the reference was taken from.
        same_reference: Whether that reference has the same text as the row's own, so that nothing changed.
    """

    reference_from: str
    same_reference: bool


class ScoredPair(_Row):
    """One pair with its scores: a row of `scores.jsonl`.

    A score that is NaN or infinite is written as the string "NaN", "Infinity" or "-Infinity", which keeps
    the file strict JSON, and is read back as the number.

    Attributes:
        id: The row's id.
        pair: Which two candidates of the row, chosen first; always 0, 1 where the row is one pair.
        source: "file:line" of the row.
        subset: The row's subset, None where it has none.
        prompt_id: A hash of the prompt's text; equal for all pairs of one prompt.
        chosen_score: Reward of the chosen candidate; against several references their mean, max or min.
        rejected_score: Reward of the rejected candidate.
        margin: `chosen_score` − `rejected_score`.
        chosen_chars: Characters of the chosen candidate's text before anything was cut; likewise rejected.
        prompt_tokens: Tokens of the prompt before anything was cut, BOS included; likewise the others. Of
            several references the longest.
        cut: Tokens cut off each field; with several references the most.
        reference_is_chosen: Whether a reference of the row has the text of the chosen candidate.
        chosen_rouge: ROUGE-L F1 of the chosen candidate against the reference, the highest of several; None
            where the reference is empty. Likewise rejected.
        reference_scores: Scores against each reference of a row that has several; else empty.
        shuffled_reference: Scores with another row's reference, where they were asked for.
        empty_reference: Scores with an empty reference, where they were asked for.
        chosen_info: What a ranked row says of the chosen candidate (policy, score or rank, …); else empty.
        rejected_info: The same for the rejected one.
        extra: Fields of the row that polar_ft does not know, as they came.
        input_hash: Hash of the pair's texts, by which runs are compared: equal in runs of other models on the
            same pair, whatever the row's id or place.
        score_key: Hash of all that decides this line (texts, model, dtype, limits, options).
    """

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
    cut: PairCut
    reference_is_chosen: bool
    chosen_rouge: float | None
    rejected_rouge: float | None
    reference_scores: list[ReferenceScores] = []
    shuffled_reference: ShuffledScores | None = None
    empty_reference: ReferenceScores | None = None
    chosen_info: dict[str, Any] = {}
    rejected_info: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    input_hash: str
    score_key: str


class RankedCandidate(_Row):
    """A candidate of a ranked row.

    Attributes:
        score: The model's reward.
        given: How good the data says it is, higher is better: its score, or its rank turned round.
        chars: Characters of its text before anything was cut.
        tokens: Tokens of its text before anything was cut.
        info: What the row says of it in addition to its text.
    """

    score: float
    given: float
    chars: int
    tokens: int
    info: dict[str, Any]


class RankedScores(_Row):
    """All candidates of a ranked row with their scores: a row of `rankings.jsonl`.

    The fields that `ScoredPair` has too are the same.

    Attributes:
        benchmark: The row's field `benchmark`, by which it counts to a published summary; None without one.
        candidates: In the order of the row, without the one that became the reference.
    """

    id: str
    source: str
    subset: str | None
    prompt_id: str
    benchmark: str | None
    candidates: list[RankedCandidate]
    extra: dict[str, Any] = {}
    input_hash: str
    score_key: str


def to_json_line(row: ScoredPair | RankedScores) -> bytes:
    """The row as a line of its file; `model_validate_json` of its class reads it back.

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
    if isinstance(value, (list, tuple)):
        return [_strict_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def input_hash(example: Example, pair: tuple[int, int] | None = None) -> str:
    """Hash of a row's texts and pairs, or of one pair as if it were a row, 16 bytes in hexadecimal."""
    candidates, pairs = example.candidates, example.pairs
    if pair is not None:
        candidates, pairs = tuple(candidates[index] for index in pair), ((0, 1),)
    return content_hash([example.wrapper, example.prompt, example.references, candidates, pairs])


def score_key(setup: str, example: Example, references: RowReferences, aggregation: str) -> str:
    """Hash of all that decides the lines of a row, what is said of it in addition to its texts included.

    Args:
        setup: What scores: `polar_ft.evaluation.cache.setup_key`.
        example: The row.
        references: What it is scored against.
        aggregation: What becomes of several references.
    """
    said = [example.id, example.source, example.subset, example.extra, example.candidate_info]
    against = [references.own, references.shuffled, references.shuffled_from, references.empty, aggregation]
    return content_hash([setup, input_hash(example), said, against])


def prompt_id(prompt: str) -> str:
    """Hash of a prompt's text, by which pairs of one prompt are found."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def pair_rows(
    example: Example,
    references: RowReferences,
    by_reference: dict[str, list[float]],
    combine: Callable[[Sequence[Sequence[float]]], list[float]],
    tokens: FieldTokens,
    key: str,
) -> list[ScoredPair]:
    """Takes the candidates' scores of a row apart into its pairs.

    Args:
        example: The row.
        references: What it was scored against.
        by_reference: Reference text → a reward for each candidate.
        combine: Makes one reward a candidate of those against several references.
        tokens: Token counts of the row.
        key: Its `score_key`.
    """
    # Imported here: it brings scipy, and names of files are all that the command line needs of this module.
    from polar_ft.evaluation.statistics.baselines import rouge_l

    lengths, cut = tokens.lengths, tokens.cut
    own = [by_reference[text] for text in references.own]
    scores = combine(own)
    shuffled = combine([by_reference[text] for text in references.shuffled]) if references.shuffled else None
    empty = by_reference[""] if references.empty else None
    info = example.candidate_info or ({},) * len(example.candidates)
    rouge: dict[int, float | None] = {}
    for index in {index for pair in example.pairs for index in pair}:
        values = [rouge_l(example.candidates[index], text) for text in references.own]
        rouge[index] = max((value for value in values if not math.isnan(value)), default=None)
    prompt = prompt_id(example.prompt)
    rows = []
    for chosen, rejected in example.pairs:
        row = ScoredPair(
            id=example.id,
            pair=(chosen, rejected),
            source=example.source,
            subset=example.subset,
            prompt_id=prompt,
            chosen_score=scores[chosen],
            rejected_score=scores[rejected],
            margin=scores[chosen] - scores[rejected],
            chosen_chars=len(example.candidates[chosen]),
            rejected_chars=len(example.candidates[rejected]),
            prompt_tokens=lengths.prompt,
            reference_tokens=lengths.reference,
            chosen_tokens=lengths.candidates[chosen],
            rejected_tokens=lengths.candidates[rejected],
            cut=PairCut(
                prompt=cut.prompt,
                reference=cut.reference,
                chosen=cut.candidates[chosen],
                rejected=cut.candidates[rejected],
            ),
            reference_is_chosen=example.candidates[chosen] in references.own,
            chosen_rouge=rouge[chosen],
            rejected_rouge=rouge[rejected],
            reference_scores=[_of_pair(each, chosen, rejected) for each in own] if len(own) > 1 else [],
            shuffled_reference=None
            if shuffled is None
            else ShuffledScores(
                chosen_score=shuffled[chosen],
                rejected_score=shuffled[rejected],
                reference_from=references.shuffled_from,
                same_reference=references.shuffled == references.own,
            ),
            empty_reference=None if empty is None else _of_pair(empty, chosen, rejected),
            chosen_info=info[chosen],
            rejected_info=info[rejected],
            extra=example.extra,
            input_hash=input_hash(example, (chosen, rejected)),
            score_key=key,
        )
        rows.append(row)
    return rows


def ranked_row(
    example: Example, scores: Sequence[float], tokens: FieldTokens, key: str
) -> RankedScores | None:
    """All candidates of a ranked row with their scores; None for a row that is one pair.

    Args:
        example: The row.
        scores: A reward for each candidate.
        tokens: Token counts of the row.
        key: Its `score_key`.
    """
    if not example.candidate_info:
        return None
    benchmark = example.extra.get("benchmark")
    return RankedScores(
        id=example.id,
        source=example.source,
        subset=example.subset,
        prompt_id=prompt_id(example.prompt),
        benchmark=benchmark if isinstance(benchmark, str) else None,
        candidates=[
            RankedCandidate(
                score=score,
                given=info["score"] if "score" in info else -info["rank"],
                chars=len(text),
                tokens=n_tokens,
                info=info,
            )
            for score, info, text, n_tokens in zip(
                scores, example.candidate_info, example.candidates, tokens.lengths.candidates, strict=True
            )
        ],
        extra=example.extra,
        input_hash=input_hash(example),
        score_key=key,
    )


def _of_pair(scores: Sequence[float], chosen: int, rejected: int) -> ReferenceScores:
    return ReferenceScores(chosen_score=scores[chosen], rejected_score=scores[rejected])


def content_hash(value: Any) -> str:
    """Hash of what JSON can hold, 16 bytes in hexadecimal."""
    text = json.dumps(value, default=str)  # in ASCII: half a surrogate pair does not stop it
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
