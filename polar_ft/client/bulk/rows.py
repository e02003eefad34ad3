"""From a row of a data set to what is scored, and back to the row with its rewards.

Rows have one of these forms; all their fields are kept, and one is added::

    {"prompt", "reference", "output"}                    "reward": r
    {"prompt", "reference", "candidates": [...]}         "rewards": [r, ...], one for each candidate
    {"prompt", "reference", "chosen", "rejected"}        "rewards": [of chosen, of rejected]
    {"prompt", "responses": [...]}                       "rewards": [r, ...], one for each response; null for
                                                         the best one where it serves as the reference
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from polar_ft.data.records import RankedRow, RowError, parse_row
from polar_ft.data.score_rows import parse_score_row
from polar_ft.groups import TextGroup


@dataclass(frozen=True, slots=True)
class RowToScore:
    """What is to be scored for a row.

    Attributes:
        group: Prompt, reference and candidates.
        places: For each entry of the row's ``rewards`` the index of its candidate, None for a response that
            serves as the reference; None where the row has one candidate and gets a ``reward``.
    """

    group: TextGroup
    places: tuple[int | None, ...] | None

    @property
    def chars(self) -> int:
        """Characters that are sent, a measure of the work: each candidate with all that precedes it."""
        before = 2 * len(self.group.prompt) + len(self.group.reference)
        return sum(before + len(candidate) for candidate in self.group.candidates)


def parse_row_to_score(row: Mapping[str, Any]) -> RowToScore:
    """Checks a row and finds what is to be scored in it.

    Raises:
        RowError: The row has none of the forms, or has rewards already.

    >>> asked = parse_row_to_score({"prompt": "2 + 2?", "reference": "4", "candidates": ["four", "five"]})
    >>> asked.group.candidates, asked.places
    (('four', 'five'), (0, 1))
    >>> responses = [{"content": text, "score": score} for text, score in [("C", 1), ("A", 3), ("B", 2)]]
    >>> asked = parse_row_to_score({"prompt": "Which?", "responses": responses})  # A is the best
    >>> asked.group.reference, asked.group.candidates, asked.places
    ('A', ('C', 'B'), (0, None, 1))
    """
    if "output" in row:
        asked = RowToScore(_group(row, [row["output"]], "output"), None)
    elif "candidates" in row:
        candidates = row["candidates"]
        if not isinstance(candidates, list) or not candidates:
            raise RowError("candidates", "must be a list of at least one string or list of messages")
        asked = RowToScore(_group(row, candidates, "candidates"), tuple(range(len(candidates))))
    elif {"chosen", "rejected", "responses"} & row.keys():
        asked = _preference_row(row)
    else:
        raise RowError(
            "", "has nothing to score — it needs output, candidates, chosen and rejected, or responses"
        )
    taken = "reward" if asked.places is None else "rewards"
    if taken in row:
        raise RowError(taken, "exists already — rename or remove it, the rewards are written under this name")
    return asked


def with_rewards(row: Mapping[str, Any], asked: RowToScore, rewards: Sequence[float]) -> dict[str, Any]:
    """Adds the rewards of the candidates, `[candidates]`, to the row.

    >>> row = {"prompt": "2 + 2?", "reference": "4", "output": "four", "id": 7}
    >>> with_rewards(row, parse_row_to_score(row), [-0.5])["reward"]
    -0.5
    """
    if asked.places is None:
        return {**row, "reward": rewards[0]}
    return {**row, "rewards": [None if place is None else rewards[place] for place in asked.places]}


def _group(row: Mapping[str, Any], candidates: Sequence[Any], name: str) -> TextGroup:
    shared = {key: row[key] for key in ("prompt", "reference", "wrapper") if row.get(key) is not None}
    groups = []
    for number, candidate in enumerate(candidates):
        try:
            groups.append(parse_score_row({**shared, "output": candidate}))
        except RowError as error:
            field = error.field
            if name != "output" and field.startswith("output"):  # the name that the row has for it
                field = f"{name}[{number}]{field.removeprefix('output')}"
            raise RowError(field, error.reason) from None
    return replace(groups[0], candidates=tuple(group.candidates[0] for group in groups))


def _preference_row(row: Mapping[str, Any]) -> RowToScore:
    checked = parse_row(row)
    example = checked.to_example(":0")
    if len(example.references) > 1:
        raise RowError("references", "has several — a reward belongs to one of them; write a row for each")
    places: list[int | None] = [0, 1]
    if isinstance(checked, RankedRow):
        reference = checked.ranking().reference
        numbers = iter(range(len(example.candidates)))
        places = [None if response is reference else next(numbers) for response in checked.responses]
    return RowToScore(example, tuple(places))
