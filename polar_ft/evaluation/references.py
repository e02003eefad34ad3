"""The references that a row is scored against: its own, and for a check other rows' or none.

Is the reference read? Rows get one another's references, or an empty one, and the accuracy should fall.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from polar_ft.data.records import Example

Aggregation = Literal["mean", "max", "min"]

_AGGREGATE: dict[str, Any] = {"mean": np.mean, "max": np.max, "min": np.min}


@dataclass(frozen=True)
class ReferenceSettings:
    """Against which references rows are scored.

    Attributes:
        aggregation: What becomes of the rewards of a candidate against several references of its row.
        shuffle_seed: Score also against another row's references, shuffled by this seed; None does not.
        empty: Score also against an empty reference.
    """

    aggregation: Aggregation = "mean"
    shuffle_seed: int | None = None
    empty: bool = False


@dataclass(frozen=True)
class RowReferences:
    """The references of one row.

    Attributes:
        own: The row's own, at least one.
        shuffled: Those of another row; empty where they were not asked for.
        shuffled_from: `source` of that row.
        empty: Whether an empty reference is wanted too.
    """

    own: tuple[str, ...]
    shuffled: tuple[str, ...] = ()
    shuffled_from: str = ""
    empty: bool = False

    @property
    def distinct(self) -> list[str]:
        """Every text that the row is to be scored against, once.

        >>> RowReferences(own=("red", "crimson"), shuffled=("red",), empty=True).distinct
        ['red', 'crimson', '']
        """
        return list(dict.fromkeys((*self.own, *self.shuffled, *([""] if self.empty else []))))


def plan_references(examples: Sequence[Example], use: ReferenceSettings) -> list[RowReferences]:
    """Which references each row is scored against, `[examples]`."""
    own = [example.references for example in examples]
    if use.shuffle_seed is None:
        return [RowReferences(texts, empty=use.empty) for texts in own]
    others = shuffle_references(own, use.shuffle_seed)
    return [
        RowReferences(own[row], own[other], examples[other].source, use.empty)
        for row, other in enumerate(others)
    ]


def aggregate(scores: Sequence[Sequence[float]], aggregation: Aggregation) -> list[float]:
    """Rewards against several references, `[references][candidates]`, as one a candidate; NaN stays NaN.

    >>> aggregate([[1.0, 5.0], [3.0, 4.0]], "mean"), aggregate([[1.0, 5.0], [3.0, 4.0]], "max")
    ([2.0, 4.5], [3.0, 5.0])
    """
    if len(scores) == 1:
        return list(scores[0])
    values: NDArray[np.float64] = np.asarray(scores, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return [float(value) for value in _AGGREGATE[aggregation](values, axis=0)]


def shuffle_references(references: Sequence[Hashable], seed: int) -> list[int]:
    """Which row's reference each row gets, such that as few rows as possible keep their own text.

    Rows often share a reference, so moving every row is not enough: what counts is that the *text* changes.
    Rows are put in random order, those of one text side by side and the commonest text first, and each takes
    the reference of the row m places on (cyclically), m being the number of rows with the commonest text.
    No text is longer than the jump, so all rows get another text if m ≤ n / 2; else 2m − n rows cannot be
    helped and keep theirs, which is the least possible. Every reference is used once.

    Args:
        references: The reference of each row, or all its references, `[rows]`.
        seed: Of the random order; the same seed gives the same shuffle.

    Returns:
        For each row the row number whose reference it gets, `[rows]`.

    >>> source = shuffle_references(["red", "red", "blue", "green"], seed=0)
    >>> sorted(source)
    [0, 1, 2, 3]
    >>> {source[0], source[1]} == {2, 3}  # both "red" rows get "blue" and "green"
    True
    """
    rng = np.random.default_rng(seed)
    rows_of: dict[Hashable, list[int]] = {}
    for row in rng.permutation(len(references)).tolist():
        rows_of.setdefault(references[row], []).append(row)
    groups = sorted(rows_of.values(), key=len, reverse=True)
    order = [row for group in groups for row in group]
    jump = len(groups[0]) if groups else 0
    sources = [0] * len(order)
    for place, row in enumerate(order):
        sources[row] = order[(place + jump) % len(order)]
    return sources
