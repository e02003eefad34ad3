"""Figures over scored pairs, in numpy alone: they need neither a model nor the texts.

What each of `n` pairs can be, and which figure counts it::

    n_pairs ─┬─ n_scored ─┬─ n_correct   margin > 0   accuracy           = n_correct / n_scored
             │            ├─ n_ties      margin = 0   accuracy_ties_half = (n_correct + n_ties / 2) / n_scored
             │            └─ n_wrong     margin < 0
             └─ n_nonfinite   a score is NaN or infinite: counted, and in no other figure

Every pair counts once, whatever its weight in training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict

Interval = tuple[float, float]

# The 97.5 % quantile of the standard normal distribution, for two-sided 95 % intervals.
Z_95 = 1.959963984540054


class PairMetrics(BaseModel):
    """Figures of one set of pairs; a figure is None where no pair has finite scores.

    Attributes:
        n_pairs: All pairs.
        n_scored: Pairs with two finite scores: the denominator of both accuracies.
        n_correct: Pairs whose chosen score is above the rejected one.
        n_ties: Pairs with exactly equal scores. A tie is not correct.
        n_nonfinite: Pairs with a NaN or infinite score; `n_pairs` = `n_scored` + `n_nonfinite`.
        accuracy: `n_correct` / `n_scored`.
        accuracy_ci95: 95 % Wilson interval of `accuracy`.
        accuracy_ties_half: The same with a tie counted as half a correct pair.
        mean_margin: Mean of chosen minus rejected score.
        log_loss: Mean Bradley–Terry loss, −log σ(margin), in nats; log 2 = 0.693 knows nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_pairs: int
    n_scored: int
    n_correct: int
    n_ties: int
    n_nonfinite: int
    accuracy: float | None
    accuracy_ci95: Interval | None
    accuracy_ties_half: float | None
    mean_margin: float | None
    log_loss: float | None


class MacroMetrics(BaseModel):
    """Unweighted means over subsets; a subset without a scored pair is left out and counted.

    Attributes:
        n_subsets: Subsets that the means are over.
        n_subsets_left_out: Subsets without a single pair of finite scores.
        accuracy: Mean of the subsets' accuracies; None where `n_subsets` is 0, as all below.
        accuracy_ci95: 95 % interval of that mean, see `macro_metrics`.
        accuracy_ties_half: Mean of the subsets' accuracies with ties as half.
        mean_margin: Mean of the subsets' mean margins.
        log_loss: Mean of the subsets' log-losses.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_subsets: int
    n_subsets_left_out: int
    accuracy: float | None
    accuracy_ci95: Interval | None
    accuracy_ties_half: float | None
    mean_margin: float | None
    log_loss: float | None


class Summary(BaseModel):
    """`PairMetrics` of all pairs and of each subset, and the mean over subsets (None without subsets)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    overall: PairMetrics
    macro: MacroMetrics | None
    subsets: dict[str, PairMetrics]


def wilson_interval(successes: float, n: int, z: float = Z_95) -> Interval:
    """Wilson's score interval of a proportion, without continuity correction.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    It stays inside [0, 1] and keeps its coverage for small n and proportions near 0 or 1, where the usual
    p ± z·√(p(1−p)/n) does not.

    Args:
        successes: Number of successes, 0 to n.
        n: Number of trials, at least 1.
        z: Normal quantile of the coverage; the default gives 95 %.

    Raises:
        ValueError: n is below 1, or successes lies outside [0, n].

    For 8 of 10 with z = 2, so z² = 4: centre (8 + 2) / 14 = 0.7143, half width
    2 / 14 · √(8 · 2 / 10 + 1) = 0.2303.

    >>> [round(bound, 4) for bound in wilson_interval(8, 10, z=2)]
    [0.4839, 0.9446]
    >>> wilson_interval(0, 4, z=2)
    (0.0, 0.5)
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"no proportion: {successes} successes of {n} trials")
    centre = (successes + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(successes * (n - successes) / n + z * z / 4)
    # At 0 and n the bound is exactly 0 or 1, which rounding can miss on either side.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def margins(chosen: ArrayLike, rejected: ArrayLike) -> NDArray[np.float64]:
    """Chosen minus rejected score, `[pairs]`, in float64; not finite where a score is not.

    >>> margins([2.0, 1.0, float("inf")], [0.5, 1.0, float("inf")])
    array([1.5, 0. , nan])
    """
    chosen_scores = np.asarray(chosen, dtype=np.float64)
    rejected_scores = np.asarray(rejected, dtype=np.float64)
    if chosen_scores.ndim != 1 or chosen_scores.shape != rejected_scores.shape:
        raise ValueError(
            f"chosen and rejected must be of one shape [pairs], got {chosen_scores.shape} and "
            f"{rejected_scores.shape}"
        )
    with np.errstate(invalid="ignore", over="ignore"):
        return chosen_scores - rejected_scores


def pair_metrics(chosen: ArrayLike, rejected: ArrayLike) -> PairMetrics:
    """Accuracy, margin and log-loss of scored pairs.

    Args:
        chosen: Scores of the chosen candidates, `[pairs]`; may hold NaN and infinities.
        rejected: Scores of the rejected candidates, `[pairs]`.

    Raises:
        ValueError: The two are not of one shape `[pairs]`.

    One pair right (margin 2), one wrong (−1), one tied, one without a finite score. Over the three scored:
    accuracy 1/3, with the tie as half 1.5/3, mean margin (2 − 1 + 0) / 3, log-loss
    (log(1 + e⁻²) + log(1 + e¹) + log 2) / 3 = (0.1269 + 1.3133 + 0.6931) / 3:

    >>> metrics = pair_metrics([3.0, 0.0, 1.0, float("nan")], [1.0, 1.0, 1.0, 0.0])
    >>> metrics.n_scored, metrics.n_correct, metrics.n_ties, metrics.n_nonfinite
    (3, 1, 1, 1)
    >>> round(metrics.accuracy, 4), metrics.accuracy_ties_half
    (0.3333, 0.5)
    >>> round(metrics.mean_margin, 4), round(metrics.log_loss, 4)
    (0.3333, 0.7111)
    """
    margin = margins(chosen, rejected)
    # A finite pair can only fail this when its margin overflows float64, which no model's scores do.
    scored = margin[np.isfinite(margin)]
    n_scored = len(scored)
    n_correct = int(np.count_nonzero(scored > 0))
    n_ties = int(np.count_nonzero(scored == 0))
    any_scored = n_scored > 0
    return PairMetrics(
        n_pairs=len(margin),
        n_scored=n_scored,
        n_correct=n_correct,
        n_ties=n_ties,
        n_nonfinite=len(margin) - n_scored,
        accuracy=n_correct / n_scored if any_scored else None,
        accuracy_ci95=wilson_interval(n_correct, n_scored) if any_scored else None,
        accuracy_ties_half=(n_correct + n_ties / 2) / n_scored if any_scored else None,
        mean_margin=float(scored.mean()) if any_scored else None,
        # logaddexp(0, −m) = log(1 + e⁻ᵐ) = −log σ(m), without overflow for very wrong pairs.
        log_loss=float(np.logaddexp(0.0, -scored).mean()) if any_scored else None,
    )


def macro_metrics(subsets: Mapping[str, PairMetrics]) -> MacroMetrics:
    """Means over subsets, each subset counting the same whatever its size.

    The interval of the mean accuracy combines the subsets' Wilson intervals (l, u) around their
    accuracies p by the square-and-add method (Zou and Donner, "Construction of confidence limits about
    effect measures: a general approach", Statistics in Medicine 27 (2008), eq. 2–3)::

        mean(p) − √Σ(p − l)² / subsets   to   mean(p) + √Σ(u − p)² / subsets

    which for one subset is its Wilson interval, and needs no large subset.

    >>> easy = pair_metrics([1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0])
    >>> hard = pair_metrics([1.0, 0.0], [0.0, 1.0])
    >>> macro_metrics({"easy": easy, "hard": hard}).accuracy  # (4/4 + 1/2) / 2, where overall is 5/6
    0.75
    """
    scored = [metrics for metrics in subsets.values() if metrics.n_scored]
    left_out = len(subsets) - len(scored)
    if not scored:
        return MacroMetrics(
            n_subsets=0,
            n_subsets_left_out=left_out,
            accuracy=None,
            accuracy_ci95=None,
            accuracy_ties_half=None,
            mean_margin=None,
            log_loss=None,
        )
    accuracy = np.array([metrics.accuracy for metrics in scored], dtype=np.float64)
    intervals = np.array([metrics.accuracy_ci95 for metrics in scored], dtype=np.float64)  # [subsets, 2]
    low, high = np.linalg.norm(intervals - accuracy[:, None], axis=0) / len(scored)
    mean = float(accuracy.mean())

    def mean_of(figure: str) -> float:
        return float(np.mean([getattr(metrics, figure) for metrics in scored]))

    return MacroMetrics(
        n_subsets=len(scored),
        n_subsets_left_out=left_out,
        accuracy=mean,
        # The limits cannot leave [0, 1] but by rounding: √Σx² ≤ Σx.
        accuracy_ci95=(max(0.0, mean - float(low)), min(1.0, mean + float(high))),
        accuracy_ties_half=mean_of("accuracy_ties_half"),
        mean_margin=mean_of("mean_margin"),
        log_loss=mean_of("log_loss"),
    )


def summarize(chosen: ArrayLike, rejected: ArrayLike, subsets: Sequence[str] | None = None) -> Summary:
    """`PairMetrics` of all pairs, of each subset in alphabetical order, and the mean over subsets.

    Args:
        chosen: Scores of the chosen candidates, `[pairs]`.
        rejected: Scores of the rejected candidates, `[pairs]`.
        subsets: The subset of each pair, `[pairs]`; None for data without subsets.

    Raises:
        ValueError: The three are not of one length.

    >>> summary = summarize([2, 1, 0], [1, 0, 1], ["chat", "code", "code"])
    >>> {name: metrics.accuracy for name, metrics in summary.subsets.items()}, summary.macro.accuracy
    ({'chat': 1.0, 'code': 0.5}, 0.75)
    """
    overall = pair_metrics(chosen, rejected)
    if subsets is None:
        return Summary(overall=overall, macro=None, subsets={})
    if len(subsets) != overall.n_pairs:
        raise ValueError(f"{len(subsets)} subset names for {overall.n_pairs} pairs")
    chosen_scores, rejected_scores = np.asarray(chosen), np.asarray(rejected)
    by_subset = {
        name: pair_metrics(chosen_scores[rows], rejected_scores[rows])
        for name, rows in rows_by_subset(subsets).items()
    }
    return Summary(overall=overall, macro=macro_metrics(by_subset), subsets=by_subset)


def rows_by_subset(subsets: Sequence[str]) -> dict[str, NDArray[np.intp]]:
    """Row numbers of each subset, subsets in alphabetical order.

    >>> rows_by_subset(["b", "a", "b"])
    {'a': array([1]), 'b': array([0, 2])}
    """
    if not len(subsets):
        return {}
    names, codes = np.unique(np.asarray(subsets, dtype=object), return_inverse=True)
    order = np.argsort(codes, kind="stable")
    groups = np.split(order, np.cumsum(np.bincount(codes))[:-1])
    return dict(zip(names.tolist(), groups, strict=True))
