"""UltraFeedback (arXiv 2310.01377): four answers a prompt, scored by GPT-4."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from polar_ft.data.converters.format import Converted, Layout, described, with_extras
from polar_ft.data.records import RowError


class Completion(BaseModel):
    """One answer; the remarks of GPT-4 are not kept."""

    model_config = ConfigDict(strict=True)

    response: str
    model: str | None = None
    overall_score: float | None = None
    fine_grained_score: float | None = Field(default=None, alias="fine-grained_score")


class UltraFeedbackRow(Layout):
    """A row of openbmb/UltraFeedback."""

    LAYOUT = "ultrafeedback"
    READ = "README of github.com/OpenBMB/UltraFeedback and code that reads the data, 2026-11-21"

    instruction: str = described("a text")
    completions: list[Completion] = described(
        'a list of objects with "response", "model" and "overall_score"'
    )
    source: str | None = described("a string", default=None)


def ultrafeedback(
    row: Mapping[str, Any],
    *,
    reference: Literal["best", "none"] = "best",
    score: Literal["overall", "fine-grained"] = "overall",
) -> Converted:
    """Converts a row of UltraFeedback to a ranked row, with the source as its subset.

    An answer without a score (null or NaN) is dropped. The remarks of GPT-4 about the answers and the system
    prompts of the answers are not kept. Written from the README and from code that reads the data, without
    access to the files. In copies from before 2023-12-29 the overall scores of 2,628 answers are doubtful
    (10 instead of 1; issue 8 of the repository): use a later one.

    Args:
        row: The row.
        reference: "best" writes no reference, so that the best answer becomes it when the row is read, as in
            the fine-tuning of POLAR; "none" writes an empty reference.
        score: "overall" orders the answers by ``overall_score`` (1 to 10), "fine-grained" by
            ``fine-grained_score``, the mean of the four aspects (1 to 5).

    Raises:
        RowError: The row has another layout, or too few scored answers.

    >>> completions = [{"response": text, "model": "m", "overall_score": score, "fine-grained_score": 3.0}
    ...                for text, score in [("A", 7.5), ("B", 9.0), ("C", 2.0), ("D", None)]]
    >>> done = ultrafeedback({"source": "flan", "instruction": "Which?", "completions": completions})
    >>> [(r["content"], r["score"]) for r in done.rows[0]["responses"]]
    [('A', 7.5), ('B', 9.0), ('C', 2.0)]
    """
    ranked = UltraFeedbackRow.of(row)
    responses = []
    for answer in ranked.completions:
        value = answer.overall_score if score == "overall" else answer.fine_grained_score
        if value is not None and math.isfinite(value):
            policy = {} if answer.model is None else {"policy": answer.model}
            responses.append({"content": answer.response, "score": value} | policy)
    needed = 3 if reference == "best" else 2
    if len(responses) < needed:
        why = "a reference and a pair" if needed == 3 else "a pair"
        raise RowError(
            "completions",
            f"has {len(responses)} answers with the score {score!r} — {why} needs {needed}",
        )
    result: dict[str, Any] = {} if ranked.source is None else {"subset": ranked.source}
    result["prompt"] = ranked.instruction
    if reference == "none":
        result["reference"] = ""
    return Converted([with_extras(result | {"responses": responses}, ranked.rest("models"))])
