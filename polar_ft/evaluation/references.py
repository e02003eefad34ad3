"""Is the reference read? Rows get one another's references, and the accuracy should fall."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def shuffle_references(references: Sequence[str], seed: int) -> list[int]:
    """Which row's reference each row gets, such that as few rows as possible keep their own text.

    Rows often share a reference, so moving every row is not enough: what counts is that the *text* changes.
    Rows are put in random order, those of one text side by side and the commonest text first, and each takes
    the reference of the row m places on (cyclically), m being the number of rows with the commonest text.
    No text is longer than the jump, so all rows get another text if m ≤ n / 2; else 2m − n rows cannot be
    helped and keep theirs, which is the least possible. Every reference is used once.

    Args:
        references: The reference of each row, `[rows]`.
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
    rows_of: dict[str, list[int]] = {}
    for row in rng.permutation(len(references)).tolist():
        rows_of.setdefault(references[row], []).append(row)
    groups = sorted(rows_of.values(), key=len, reverse=True)
    order = [row for group in groups for row in group]
    jump = len(groups[0]) if groups else 0
    sources = [0] * len(order)
    for place, row in enumerate(order):
        sources[row] = order[(place + jump) % len(order)]
    return sources
