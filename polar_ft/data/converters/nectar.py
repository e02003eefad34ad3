"""Nectar: seven answers a prompt, ranked by GPT-4."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from polar_ft.data.converters.dialogues import parse_dialogue
from polar_ft.data.converters.format import Converted, Layout, described, with_extras
from polar_ft.data.records import RowError


class RankedAnswer(BaseModel):
    """One answer; rank 1 is the best."""

    model_config = ConfigDict(strict=True)

    answer: str
    rank: float | None
    model: str | None = None


class NectarRow(Layout):
    """A row of berkeley-nest/Nectar."""

    LAYOUT = "nectar"
    READ = "card and features of berkeley-nest/Nectar, and code that reads it, 2026-11-24"

    prompt: str = described('a dialogue, "\\n\\nHuman: …\\n\\nAssistant: "')
    answers: list[RankedAnswer] = described('a list of objects with "answer", "model" and "rank"')
    source: list[str] | str | None = described("a list of names", default=None)
    turns: int | None = described("a number", default=None)
    num_responses: int | None = described("a number", default=None)


def nectar(row: Mapping[str, Any], *, reference: Literal["best", "none"] = "best") -> Converted:
    r"""Converts a row of Nectar to a ranked row, with the sources of its prompt as the subset.

    An answer without a rank (null or NaN) is dropped. Written from the data card and from code that reads the
    data, without access to the file.

    Args:
        row: The row.
        reference: "best" writes no reference, so that the best answer becomes it when the row is read, as in
            the fine-tuning of POLAR; "none" writes an empty reference.

    Raises:
        RowError: The row has another layout, its prompt is no dialogue, or it has too few ranked answers.

    >>> answers = [{"answer": text, "model": "m", "rank": rank} for rank, text in enumerate("ABC", start=1)]
    >>> row = {"prompt": "\n\nHuman: Which?\n\nAssistant: ", "answers": answers, "source": ["sharegpt"]}
    >>> done = nectar(row).rows[0]
    >>> done["prompt"], done["subset"], [(r["content"], r["rank"]) for r in done["responses"]]
    ([{'role': 'user', 'content': 'Which?'}], 'sharegpt', [('A', 1.0), ('B', 2.0), ('C', 3.0)])
    """
    ranked = NectarRow.of(row)
    *prompt, last = parse_dialogue(row, "prompt")
    if last["content"]:
        raise RowError("prompt", "does not end where the answer begins, with Assistant: and nothing after it")
    responses = [
        {"content": answer.answer, "rank": answer.rank}
        | ({} if answer.model is None else {"policy": answer.model})
        for answer in ranked.answers
        if answer.rank is not None and math.isfinite(answer.rank)
    ]
    needed = 3 if reference == "best" else 2
    if len(responses) < needed:
        why = "a reference and a pair" if needed == 3 else "a pair"
        raise RowError("answers", f"has {len(responses)} answers with a rank — {why} needs {needed}")
    sources = [ranked.source] if isinstance(ranked.source, str) else ranked.source or []
    result: dict[str, Any] = {"subset": ", ".join(sources)} if sources else {}
    result["prompt"] = prompt
    if reference == "none":
        result["reference"] = ""
    return Converted([with_extras(result | {"responses": responses}, ranked.rest())])
