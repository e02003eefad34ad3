"""What the same pairs give without a model, beside which an accuracy has to be read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict

from polar_ft.evaluation.metrics import margins, summarize


class Baseline(BaseModel):
    """Accuracy of a rule without a model, ties counted as half; None where no pair was scored.

    Attributes:
        overall: Over all scored pairs.
        macro: Mean over subsets; None without subsets.
        subsets: Of each subset.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    overall: float | None
    macro: float | None
    subsets: dict[str, float | None]


class Baselines(BaseModel):
    """The rules that every accuracy is shown beside.

    Attributes:
        longer_wins: The candidate with more characters (Unicode code points of its text, before anything is
            cut) is taken as the better one; equal lengths count as half.
        shorter_wins: The one with fewer: always 1 − `longer_wins`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    longer_wins: Baseline
    shorter_wins: Baseline


def rule_baseline(chosen: ArrayLike, rejected: ArrayLike, subsets: Sequence[str] | None = None) -> Baseline:
    """Accuracy of a rule that prefers the candidate with the larger value, ties as half.

    Args:
        chosen: The rule's value of each chosen candidate, `[pairs]`.
        rejected: The rule's value of each rejected candidate, `[pairs]`.
        subsets: The subset of each pair, `[pairs]`; None for data without subsets.

    Raises:
        ValueError: The three are not of one length.

    >>> rule_baseline([5, 3, 4], [2, 3, 6]).overall  # right, tied, wrong
    0.5
    """
    summary = summarize(chosen, rejected, subsets)
    return Baseline(
        overall=summary.overall.accuracy_ties_half,
        macro=summary.macro.accuracy_ties_half if summary.macro else None,
        subsets={name: metrics.accuracy_ties_half for name, metrics in summary.subsets.items()},
    )


def length_baselines(
    chosen_chars: Sequence[int],
    rejected_chars: Sequence[int],
    *,
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    subsets: Sequence[str] | None = None,
) -> Baselines:
    """ "The longer one wins" and "the shorter one wins", on the pairs that the accuracy is over.

    A pair without finite scores has no part in the accuracy, so it has none in its baselines either.

    Args:
        chosen_chars: Characters of each chosen candidate, `[pairs]`.
        rejected_chars: Characters of each rejected candidate, `[pairs]`.
        chosen_scores: The model's scores of the chosen candidates, `[pairs]`.
        rejected_scores: The model's scores of the rejected candidates, `[pairs]`.
        subsets: The subset of each pair, `[pairs]`; None for data without subsets.

    Raises:
        ValueError: They are not of one length.

    >>> both = length_baselines([9, 4, 1], [3, 8, 5], chosen_scores=[0, 0, 0], rejected_scores=[1, 1, 1])
    >>> round(both.longer_wins.overall, 3), round(both.shorter_wins.overall, 3)
    (0.333, 0.667)
    """
    scored = np.isfinite(margins(chosen_scores, rejected_scores))
    # NaN marks the pair as not scored, for the rule as for the model.
    chosen_lengths = np.where(scored, np.asarray(chosen_chars, dtype=np.float64), np.nan)
    rejected_lengths = np.where(scored, np.asarray(rejected_chars, dtype=np.float64), np.nan)
    return Baselines(
        longer_wins=rule_baseline(chosen_lengths, rejected_lengths, subsets),
        shorter_wins=rule_baseline(rejected_lengths, chosen_lengths, subsets),
    )
