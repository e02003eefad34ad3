"""Is length taken for quality? Accuracy by which side is longer, and with length accounted for."""

from __future__ import annotations

from typing import Literal

import numpy as np
import scipy  # its parts load when they are first used
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict

from polar_ft.evaluation.pairs import Bools, Floats, Ints, PairTable
from polar_ft.evaluation.statistics.accuracy import Interval, wilson_interval
from polar_ft.evaluation.statistics.resampling import prompt_numbers

GROUPS = 10


class LengthGroup(BaseModel):
    """Accuracy of the pairs whose length difference lies in a range.

    Attributes:
        low: Least length difference (chosen − rejected) in the group.
        high: Greatest one.
        n_pairs: Scored pairs; the figures below are None where there is none.
        accuracy: Share of correct pairs; a tie is not correct.
        accuracy_ci95: 95 % Wilson interval of `accuracy`.
        accuracy_ties_half: The same with a tie as half.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: int | None
    high: int | None
    n_pairs: int
    accuracy: float | None
    accuracy_ci95: Interval | None
    accuracy_ties_half: float | None


class Correlation(BaseModel):
    """Pearson's r and Spearman's ρ of two quantities; None where one of them is constant."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pearson: float | None
    spearman: float | None


class LengthBias(BaseModel):
    """How scores go with the length of the candidates, over the scored pairs.

    Attributes:
        unit: What length is counted in, before anything is cut.
        n_pairs: Scored pairs.
        chosen_longer: Pairs whose chosen candidate is the longer one.
        rejected_longer: Pairs whose rejected candidate is the longer one.
        equal_length: Pairs with candidates of one length.
        by_difference: Accuracy against length difference: groups of about equal size, in order of the
            difference.
        score_and_length: Correlation of score and length over all candidates of all pairs.
        margin_and_difference: Correlation of margin and length difference over pairs. A good model shows
            some of it where the data's chosen candidates are longer.
        length_controlled_accuracy: What the accuracy (ties as half) would be if both candidates of each pair
            had one length; see `length_controlled`.
        length_controlled_ci95: 95 % interval of it.
        length_effect: Log-odds of being right that a much longer chosen candidate brings, against one of
            equal length; above 0 the model favours the longer candidate, below 0 the shorter one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: Literal["characters", "tokens"]
    n_pairs: int
    chosen_longer: LengthGroup
    rejected_longer: LengthGroup
    equal_length: LengthGroup
    by_difference: list[LengthGroup]
    score_and_length: Correlation
    margin_and_difference: Correlation
    length_controlled_accuracy: float | None
    length_controlled_ci95: Interval | None
    length_effect: float | None


def length_bias(table: PairTable, n_groups: int = GROUPS) -> LengthBias | None:
    """Length bias over the scored pairs; None where lengths are not known or no pair is scored.

    Lengths are characters where these are known, as they belong to the data and not to a tokenizer, else
    tokens.

    Args:
        table: The pairs.
        n_groups: Groups of `by_difference`; fewer where many pairs have one difference.

    A model that always prefers the longer candidate, right where that is the chosen one:

    >>> table = PairTable(
    ...     chosen_score=np.array([5.0, 9, 2, 4]), rejected_score=np.array([3.0, 4, 7, 4]),
    ...     chosen_chars=np.array([50, 90, 20, 40]), rejected_chars=np.array([30, 40, 70, 40]))
    >>> bias = length_bias(table, n_groups=2)
    >>> bias.chosen_longer.accuracy, bias.rejected_longer.accuracy, bias.equal_length.accuracy_ties_half
    (1.0, 0.0, 0.5)
    >>> bias.score_and_length.spearman, bias.margin_and_difference.spearman
    (1.0, 1.0)
    >>> [(group.low, group.high, group.n_pairs) for group in bias.by_difference]
    [(-50, 0, 2), (20, 50, 2)]
    """
    scored = table.scored
    unit: Literal["characters", "tokens"] = "characters"
    chosen, rejected = table.chosen_chars, table.rejected_chars
    if chosen is None or rejected is None:
        unit, chosen, rejected = "tokens", table.chosen_tokens, table.rejected_tokens
    if chosen is None or rejected is None or not scored.any():
        return None
    chosen, rejected, margin = chosen[scored], rejected[scored], table.margins[scored]
    difference = chosen - rejected
    controlled = length_controlled(
        margin, difference, None if table.prompts is None else table.prompts[scored]
    )
    return LengthBias(
        unit=unit,
        n_pairs=len(margin),
        chosen_longer=_group(margin, difference, difference > 0),
        rejected_longer=_group(margin, difference, difference < 0),
        equal_length=_group(margin, difference, difference == 0),
        by_difference=_by_difference(margin, difference, n_groups),
        score_and_length=correlation(
            np.concatenate([table.chosen_score[scored], table.rejected_score[scored]]),
            np.concatenate([chosen, rejected]),
        ),
        margin_and_difference=correlation(margin, difference),
        length_controlled_accuracy=controlled.accuracy,
        length_controlled_ci95=controlled.ci95,
        length_effect=controlled.length_effect,
    )


def correlation(one: ArrayLike, other: ArrayLike) -> Correlation:
    """Pearson's r, and Spearman's ρ with mean ranks for ties.

    >>> both = correlation([1, 2, 3], [1, 4, 9])
    >>> round(both.pearson, 4), both.spearman
    (0.9897, 1.0)
    """
    x, y = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    return Correlation(
        pearson=_pearson(x, y), spearman=_pearson(scipy.stats.rankdata(x), scipy.stats.rankdata(y))
    )


class LengthControlled(BaseModel):
    """Result of `length_controlled`, its fields as in `LengthBias`; None where it has no value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    accuracy: float
    ci95: Interval | None
    length_effect: float | None


def length_controlled(margin: Floats, difference: ArrayLike, prompts: Ints | None = None) -> LengthControlled:
    """Accuracy if both candidates of each pair had one length, by logistic regression.

    With d = length of chosen − length of rejected and s its standard deviation, fits::

        P(the model prefers chosen) = σ(a + b · tanh(d / s))

    and gives σ(a), the probability at d = 0. This is the length term of length-controlled AlpacaEval (Dubois
    et al. 2024, arXiv 2404.04475), where chosen and rejected stand for model and baseline; its terms for
    several models have no counterpart here. A tie counts as half a preference. As there, b is shrunk: by
    b² / 2, the penalty of scikit-learn's default C = 1, which few pairs outweigh; it keeps b finite where
    length alone tells right from wrong. The interval is σ(a ± t · standard error of a), the error robust to
    misfit and to pairs that share a prompt (the sandwich; Liang and Zeger, Biometrika 73 (1986)), t being the
    quantile for the number of prompts.

    Args:
        margin: Finite margins, `[pairs]`, at least one.
        difference: Length of chosen − length of rejected, `[pairs]`.
        prompts: Number of the prompt of each pair, `[pairs]`; None for a prompt a pair.

    Returns:
        Where all pairs have one length difference, the accuracy as it is. Where all are right or all wrong,
        1 or 0 without an interval.

    The model is right on 3 of 4 pairs with longer and on 1 of 4 with shorter chosen candidates. At equal
    length it is right half the time:

    >>> margin = np.array([1.0, 1, 1, -1, -1, -1, -1, 1])
    >>> fit = length_controlled(margin, [20, 20, 20, 20, -20, -20, -20, -20])
    >>> round(fit.accuracy, 6), fit.length_effect > 0
    (0.5, True)
    """
    credit = (np.sign(margin) + 1) / 2
    if np.all(credit == credit[0]) and credit[0] != 0.5:
        return LengthControlled(accuracy=float(credit[0]), ci95=None, length_effect=None)
    lengths = np.asarray(difference, dtype=np.float64)
    spread = lengths.std()
    bias = np.tanh(lengths / spread) if spread > 0 else np.zeros_like(lengths)
    features = np.stack([np.ones_like(bias), bias], axis=1)  # [pairs, 2]
    penalty = np.array([0.0, 1.0])
    weights = np.zeros(2)
    for _ in range(100):  # Newton's method; a handful of steps for a convex loss of two unknowns
        expected = scipy.special.expit(features @ weights)
        gradient = features.T @ (expected - credit) + penalty * weights
        hessian = (features.T * (expected * (1 - expected))) @ features + np.diag(penalty)
        step = np.linalg.solve(hessian, gradient)
        weights = weights - step
        if np.abs(step).max() < 1e-10:
            break
    residuals = features * (credit - scipy.special.expit(features @ weights))[:, None]
    if prompts is not None:
        numbers = prompt_numbers(prompts)
        residuals = np.stack([np.bincount(numbers, column) for column in residuals.T], axis=1)
    n_prompts = len(residuals)
    ci95 = None
    if n_prompts > 1:
        bread = np.linalg.inv(hessian)
        covariance = bread @ (residuals.T @ residuals) @ bread * n_prompts / (n_prompts - 1)
        half = scipy.stats.t.ppf(0.975, n_prompts - 1) * np.sqrt(covariance[0, 0])
        ci95 = (float(scipy.special.expit(weights[0] - half)), float(scipy.special.expit(weights[0] + half)))
    return LengthControlled(
        accuracy=float(scipy.special.expit(weights[0])),
        ci95=ci95,
        length_effect=float(weights[1]) if spread > 0 else None,
    )


def _group(margin: Floats, difference: Ints, rows: Bools) -> LengthGroup:
    margin, difference = margin[rows], difference[rows]
    n = len(margin)
    if not n:
        return LengthGroup(
            low=None, high=None, n_pairs=0, accuracy=None, accuracy_ci95=None, accuracy_ties_half=None
        )
    n_correct, n_ties = int(np.count_nonzero(margin > 0)), int(np.count_nonzero(margin == 0))
    return LengthGroup(
        low=int(difference.min()),
        high=int(difference.max()),
        n_pairs=n,
        accuracy=n_correct / n,
        accuracy_ci95=wilson_interval(n_correct, n),
        accuracy_ties_half=(n_correct + n_ties / 2) / n,
    )


def _by_difference(margin: Floats, difference: Ints, n_groups: int) -> list[LengthGroup]:
    """Groups of about equal size; pairs of one difference are never apart."""
    cuts = np.quantile(difference, np.arange(1, n_groups) / n_groups, method="inverted_cdf")
    places = np.searchsorted(np.unique(cuts), difference, side="left")  # (…, cut 0], (cut 0, cut 1], …
    return [_group(margin, difference, places == place) for place in np.unique(places)]


def _pearson(x: Floats, y: Floats) -> float | None:
    x, y = x - x.mean(), y - y.mean()
    norm = np.sqrt((x @ x) * (y @ y))
    # Rounding can bring a perfect correlation just beyond 1.
    return float(np.clip(x @ y / norm, -1.0, 1.0)) if norm > 0 else None
