"""Accuracy, ties, margin and log-loss of scored pairs, with intervals: of all, of subsets, and their mean.

What each of `n` pairs can be, and which figure counts it::

    n_pairs ─┬─ n_scored ─┬─ n_correct   margin > 0   accuracy           = n_correct / n_scored
             │            ├─ n_ties      margin = 0   accuracy_ties_half = (n_correct + n_ties / 2) / n_scored
             │            └─ n_wrong     margin < 0
             └─ n_nonfinite   a score is NaN or infinite: counted, and in no other figure

Every pair counts once, whatever its weight in training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict

from polar_ft.evaluation.pairs import Categories, Floats, Ints
from polar_ft.evaluation.statistics.resampling import SAMPLES, SEED, Interval, bootstrap_ratio, prompt_numbers

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
        n_prompts: Prompts of the scored pairs; None where prompts are not known.
        accuracy_ci95_by_prompt: 95 % interval of `accuracy` that knows which pairs share a prompt: bootstrap
            over prompts. None where prompts are not known or each has one pair, for which `accuracy_ci95`
            is right; where it is there, it is the one to quote.
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
    n_prompts: int | None = None
    accuracy_ci95_by_prompt: Interval | None = None

    @property
    def interval(self) -> Interval | None:
        """The interval of the accuracy to quote: by prompt where there is one, else Wilson's."""
        return self.accuracy_ci95_by_prompt or self.accuracy_ci95


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
        accuracy_ci95_by_prompt: The same interval from the subsets' intervals by prompt; None where no subset
            has one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_subsets: int
    n_subsets_left_out: int
    accuracy: float | None
    accuracy_ci95: Interval | None
    accuracy_ties_half: float | None
    mean_margin: float | None
    log_loss: float | None
    accuracy_ci95_by_prompt: Interval | None = None

    @property
    def interval(self) -> Interval | None:
        """The interval of the accuracy to quote: by prompt where there is one, else from Wilson's."""
        return self.accuracy_ci95_by_prompt or self.accuracy_ci95


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


def margin_metrics(
    margin: Floats, prompts: Ints | None = None, *, samples: int = SAMPLES, seed: int = SEED
) -> PairMetrics:
    """Accuracy, margin and log-loss of scored pairs.

    Args:
        margin: Chosen − rejected score, `[pairs]`; not finite where a score is not.
        prompts: Number of the prompt of each pair, `[pairs]`; None where it is not known.
        samples: Samples of the bootstrap over prompts.
        seed: Of the bootstrap.

    Raises:
        ValueError: Not every margin has a prompt.

    One pair right (margin 2), one wrong (−1), one tied, one without a finite score. Over the three scored:
    accuracy 1/3, with the tie as half 1.5/3, mean margin (2 − 1 + 0) / 3, log-loss
    (log(1 + e⁻²) + log(1 + e¹) + log 2) / 3 = (0.1269 + 1.3133 + 0.6931) / 3:

    >>> metrics = margin_metrics(np.array([2.0, -1.0, 0.0, np.nan]))
    >>> metrics.n_scored, metrics.n_correct, metrics.n_ties, metrics.n_nonfinite
    (3, 1, 1, 1)
    >>> round(metrics.accuracy, 4), metrics.accuracy_ties_half
    (0.3333, 0.5)
    >>> round(metrics.mean_margin, 4), round(metrics.log_loss, 4)
    (0.3333, 0.7111)
    """
    if prompts is not None and len(prompts) != len(margin):
        raise ValueError(f"{len(prompts)} prompts for {len(margin)} pairs")
    finite = np.isfinite(margin)
    scored = margin[finite]
    n_scored = len(scored)
    n_correct = int(np.count_nonzero(scored > 0))
    n_ties = int(np.count_nonzero(scored == 0))
    any_scored = n_scored > 0
    n_prompts, by_prompt = None, None
    if prompts is not None:
        n_prompts, by_prompt = interval_by_prompt(scored > 0, prompts[finite], samples=samples, seed=seed)
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
        n_prompts=n_prompts,
        accuracy_ci95_by_prompt=by_prompt,
    )


def interval_by_prompt(
    credit: ArrayLike, prompts: Ints, *, samples: int = SAMPLES, seed: int = SEED
) -> tuple[int, Interval | None]:
    """Number of prompts, and the 95 % interval of the mean credit that knows which pairs share one.

    Where all prompts have the same mean credit, as when every pair is right, the bootstrap has nothing to
    vary. The prompts themselves are then the sample, and Wilson's interval of so many trials is given.

    Args:
        credit: Of each pair, 0 to 1, `[pairs]`.
        prompts: Number of the prompt of each pair, `[pairs]`.
        samples: Samples of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        The prompts, and the interval; None where each prompt has one pair.

    Two prompts of two pairs, all right; Wilson's interval of 2 of 2 prompts:

    >>> n_prompts, (low, high) = interval_by_prompt([1, 1, 1, 1], np.array([7, 7, 8, 8]))
    >>> n_prompts, round(low, 3), high
    (2, 0.342, 1.0)
    """
    numbers = prompt_numbers(prompts)
    n_prompts = int(numbers.max(initial=-1)) + 1
    if n_prompts == len(prompts):
        return n_prompts, None
    boot = bootstrap_ratio(credit, np.ones(len(prompts)), numbers, samples=samples, seed=seed)
    if not boot.has_spread:
        return n_prompts, wilson_interval(boot.estimate * n_prompts, n_prompts)
    return n_prompts, boot.interval()


def macro_metrics(subsets: Mapping[str, PairMetrics]) -> MacroMetrics:
    """Means over subsets, each subset counting the same whatever its size.

    The interval of the mean accuracy combines the subsets' Wilson intervals (l, u) around their
    accuracies p by the square-and-add method (Zou and Donner, "Construction of confidence limits about
    effect measures: a general approach", Statistics in Medicine 27 (2008), eq. 2–3)::

        mean(p) − √Σ(p − l)² / subsets   to   mean(p) + √Σ(u − p)² / subsets

    which for one subset is its Wilson interval, and needs no large subset. The interval by prompt combines
    the subsets' intervals by prompt in the same way. Both take subsets as independent: a prompt that has
    pairs in several subsets is not accounted for.

    >>> easy, hard = margin_metrics(np.array([1.0, 1.0, 1.0, 1.0])), margin_metrics(np.array([1.0, -1.0]))
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
    mean = float(accuracy.mean())

    def square_and_add(intervals: list[Interval | None]) -> Interval:
        bounds = np.array(intervals, dtype=np.float64)  # [subsets, 2]
        low, high = np.linalg.norm(bounds - accuracy[:, None], axis=0) / len(scored)
        # The limits cannot leave [0, 1] but by rounding: √Σx² ≤ Σx.
        return max(0.0, mean - float(low)), min(1.0, mean + float(high))

    def mean_of(figure: str) -> float:
        return float(np.mean([getattr(metrics, figure) for metrics in scored]))

    return MacroMetrics(
        n_subsets=len(scored),
        n_subsets_left_out=left_out,
        accuracy=mean,
        accuracy_ci95=square_and_add([metrics.accuracy_ci95 for metrics in scored]),
        accuracy_ties_half=mean_of("accuracy_ties_half"),
        mean_margin=mean_of("mean_margin"),
        log_loss=mean_of("log_loss"),
        accuracy_ci95_by_prompt=(
            square_and_add([metrics.interval for metrics in scored])
            if any(metrics.accuracy_ci95_by_prompt for metrics in scored)
            else None
        ),
    )


def subset_metrics(
    margin: Floats,
    subsets: Categories,
    prompts: Ints | None = None,
    *,
    samples: int = SAMPLES,
    seed: int = SEED,
) -> dict[str, PairMetrics]:
    """`margin_metrics` of each subset that has a pair, in the order of `subsets.names`.

    >>> by_subset = subset_metrics(np.array([1.0, 2.0, -1.0]), Categories.from_values(["b", "a", "b"]))
    >>> {name: metrics.accuracy for name, metrics in by_subset.items()}
    {'a': 1.0, 'b': 0.5}
    """
    return {
        name: margin_metrics(
            margin[rows], None if prompts is None else prompts[rows], samples=samples, seed=seed
        )
        for name, rows in subsets.rows().items()
    }
