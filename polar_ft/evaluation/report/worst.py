"""The pairs on which the model is most wrong, with the texts to see why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polar_ft.data.records import Example
from polar_ft.evaluation.pairs import PairTable
from polar_ft.groups import TextGroup
from polar_ft.template import PolarTemplate

N_WORST = 20


@dataclass(frozen=True)
class FieldText:
    """A text as the data has it, and the part of it that the model read.

    Attributes:
        text: The whole text.
        start: Where the part that was read begins, in characters.
        stop: Where it ends; `text[start:stop]` was read, the rest was cut.
    """

    text: str
    start: int
    stop: int


@dataclass(frozen=True)
class PairTexts:
    """The texts of a pair; a row may have several references."""

    prompt: FieldText
    references: tuple[FieldText, ...]
    chosen: FieldText
    rejected: FieldText


@dataclass(frozen=True)
class WorstPair:
    """One pair of the report's last section.

    Attributes:
        row: Its number in the table, from 0.
        id: The row's id, "" where the scores have none.
        subset: Its subset, None where there is none.
        chosen_score: Reward of the chosen candidate.
        rejected_score: Reward of the rejected candidate.
        texts: None where only scores are known.
    """

    row: int
    id: str
    subset: str | None
    chosen_score: float
    rejected_score: float
    texts: PairTexts | None

    @property
    def margin(self) -> float:
        """`chosen_score` − `rejected_score`."""
        return self.chosen_score - self.rejected_score


def lowest_margins(chosen: ArrayLike, rejected: ArrayLike, limit: int = N_WORST) -> NDArray[np.intp]:
    """Rows of the lowest margins, lowest first, the earlier row first among equals.

    Args:
        chosen: Scores, `[pairs]`; rows with a score that is not finite are left out.
        rejected: The same for the rejected candidates.
        limit: How many at most.

    >>> lowest_margins([1.0, 0.0, 5.0, 2.0, float("nan")], [3.0, 0.0, 1.0, 9.0, 0.0])
    array([3, 0, 1, 2])
    """
    with np.errstate(invalid="ignore"):
        margin = np.asarray(chosen, dtype=np.float64) - np.asarray(rejected, dtype=np.float64)
    rows = np.flatnonzero(np.isfinite(margin))
    if len(rows) > limit:
        # A partial sort: of a million pairs, twenty are wanted. The last value may have ties beyond it.
        bound = np.partition(margin[rows], limit - 1)[limit - 1]
        rows = rows[margin[rows] <= bound]
    return rows[np.argsort(margin[rows], kind="stable")][:limit]


def worst_pairs(
    table: PairTable, texts: Callable[[int], PairTexts] | None = None, limit: int = N_WORST
) -> list[WorstPair]:
    """The pairs with the lowest margins, lowest first.

    Args:
        table: The scored pairs.
        texts: Gives the texts of a row of the table; None where only scores are known.
        limit: How many at most.
    """
    subset = next(iter(table.subsets.values()), None)
    return [
        WorstPair(
            row=row,
            id=table.ids[row] if table.ids is not None else "",
            subset=None if subset is None else subset.names[subset.codes[row]],
            chosen_score=float(table.chosen_score[row]),
            rejected_score=float(table.rejected_score[row]),
            texts=texts(row) if texts is not None else None,
        )
        for row in lowest_margins(table.chosen_score, table.rejected_score, limit).tolist()
    ]


def pair_texts(template: PolarTemplate, example: Example, chosen: int, rejected: int) -> PairTexts:
    """The texts of a pair with what the template cuts off them.

    Args:
        template: The scorer's template: a prompt is cut on the left, a response on the right.
        example: The row.
        chosen: Index of the chosen candidate among the example's; likewise
        rejected: that of the rejected one.
    """
    candidates = (example.candidates[chosen], example.candidates[rejected])
    kept = template.kept(TextGroup(example.prompt, (example.reference,), candidates, example.wrapper))
    read_chosen, read_rejected = kept.candidates
    return PairTexts(
        prompt=FieldText(example.prompt, len(example.prompt) - len(kept.prompt), len(example.prompt)),
        references=tuple(
            FieldText(text, 0, len(template.kept(TextGroup("", (text,), ("",))).reference))
            for text in example.references
        ),
        chosen=FieldText(candidates[0], 0, len(read_chosen)),
        rejected=FieldText(candidates[1], 0, len(read_rejected)),
    )
