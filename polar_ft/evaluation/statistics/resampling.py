"""Intervals and p-values by drawing prompts, not pairs: the bootstrap for clustered data.

Pairs of one prompt succeed and fail together, so what a new data set would draw again is the prompt with all
its pairs (Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8). Every figure
here is a ratio of sums over prompts, such as correct pairs / scored pairs. A sample of C prompts with
replacement then depends only on how often it holds each *kind* of prompt, the kinds being the distinct
(numerator, denominator)::

    prompt      0      1      2      3                kind      1/2    2/2
    right/n    1/2    2/2    1/2    1/2       →       prompts    3      1
                                                      a sample ~ Multinomial(4; 3/4, 1/4), e.g.  (2, 2)
                                                      its accuracy = (2·1 + 2·2) / (2·2 + 2·2) = 6/8

which is the same bootstrap, not an approximation, in the time and memory of the kinds, not of the prompts:
250,000 prompts with four pairs each are of five kinds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy  # its parts load when they are first used
from numpy.typing import ArrayLike

from polar_ft.evaluation.pairs import Floats, Ints

Interval = tuple[float, float]

SAMPLES = 2000
SEED = 0

# Counts held at once: 32 MB.
_COUNTS_AT_ONCE = 4_000_000

# Far below any difference between two ratios of counts, far above their rounding.
_TINY = 1e-12


@dataclass(frozen=True)
class Bootstrap:
    """Bootstrap of a ratio of sums over prompts.

    Attributes:
        estimate: The ratio over all prompts.
        n_prompts: Number of prompts drawn in each sample.
        samples: The ratio of each sample, `[samples]`, in ascending order.
        acceleration: Skewness of the prompts' influences on the ratio / 6: how fast its error grows with it.
    """

    estimate: float
    n_prompts: int
    samples: Floats
    acceleration: float

    @property
    def has_spread(self) -> bool:
        """False where every prompt has the same ratio, of which a bootstrap learns nothing."""
        return self.n_prompts > 1 and bool(self.samples[0] < self.samples[-1])

    def interval(self, level: float = 0.95) -> Interval:
        """The BCa interval, widened for few prompts. Needs `has_spread`.

        Plain percentiles are off for a skewed ratio, such as an accuracy near 1. BCa moves the levels at
        which they are taken by the median bias z₀ and the acceleration a (Efron, "Better bootstrap confidence
        intervals", JASA 82 (1987), equation 2.3)::

            Φ(z₀ + w / (1 − a·w)),  w = z₀ ± z

        They are also too narrow for few prompts, as a normal quantile in place of Student's t and a variance
        divided by C in place of C − 1 are; z = √(C / (C − 1)) · t with t of C − 1 degrees of freedom makes
        good for both (Hesterberg, "What teachers should know about the bootstrap", The American Statistician
        69 (2015), the expanded percentile interval).
        """
        z = self._expansion * scipy.stats.t.ppf((1 + level) / 2, self.n_prompts - 1)
        w = self._median_bias + np.array([-z, z])
        levels = scipy.special.ndtr(self._median_bias + w / np.maximum(1 - self.acceleration * w, _TINY))
        low, high = np.quantile(self.samples, levels)
        return float(low), float(high)

    def p_value(self) -> float:
        """Two-sided p-value of the ratio being 0: how often chance alone is off by as much as the ratio is.

        The samples lie about the estimate as the estimate lies about the truth (Hall and Wilson, "Two
        guidelines for bootstrap hypothesis testing", Biometrics 47 (1991), the first), so p is the share of
        samples at least |estimate| away from it, counting one sample more, and for few prompts widened as the
        interval is. Needs `has_spread`.
        """
        off = np.abs(self.samples - self.estimate) >= abs(self.estimate) - _TINY
        share = (np.count_nonzero(off) + 1) / (len(off) + 1)
        return float(
            2 * scipy.stats.t.cdf(scipy.special.ndtri(share / 2) / self._expansion, self.n_prompts - 1)
        )

    @property
    def _expansion(self) -> float:
        return math.sqrt(self.n_prompts / (self.n_prompts - 1))

    @property
    def _median_bias(self) -> float:
        """z₀: Φ⁻¹ of the share of samples below the estimate; those equal to it but for rounding as half."""
        around = self.estimate + np.array([-_TINY, _TINY])
        share = float(np.searchsorted(self.samples, around).mean()) / len(self.samples)
        least = 0.5 / len(self.samples)
        return float(scipy.special.ndtri(min(max(share, least), 1 - least)))


def bootstrap_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    prompts: Ints | None = None,
    *,
    samples: int = SAMPLES,
    seed: int = SEED,
) -> Bootstrap:
    """Bootstraps Σ numerator / Σ denominator over prompts.

    The draws depend on the kinds of prompts alone, so neither the order of the pairs nor the numbering of the
    prompts changes the result.

    Args:
        numerator: Of each pair, `[pairs]`, finite.
        denominator: Of each pair, `[pairs]`, positive.
        prompts: The prompt of each pair, as `prompt_numbers` numbers them, `[pairs]`; None for a prompt a
            pair.
        samples: Samples drawn.
        seed: Of the draws.

    Raises:
        ValueError: There are no pairs.

    Four prompts of two pairs, as in the drawing above; 5 of 8 pairs are right:

    >>> boot = bootstrap_ratio([1, 0, 1, 1, 1, 0, 0, 1], np.ones(8), np.array([0, 0, 1, 1, 2, 2, 3, 3]))
    >>> boot.estimate, boot.n_prompts, sorted(set(boot.samples.tolist()))
    (0.625, 4, [0.5, 0.625, 0.75, 0.875, 1.0])
    """
    over = np.asarray(numerator, dtype=np.float64)
    under = np.asarray(denominator, dtype=np.float64)
    if not len(over):
        raise ValueError("no pairs to draw from")
    if prompts is not None:
        over = np.bincount(prompts, over).astype(np.float64)
        under = np.bincount(prompts, under).astype(np.float64)
    estimate, n_prompts = float(over.sum() / under.sum()), len(over)
    # As complex numbers, pairs of floats have an order, and numpy sorts them several times faster than rows.
    kinds, counts = np.unique(under + 1j * over, return_counts=True)
    over, under = kinds.imag, kinds.real
    shares = counts / n_prompts
    rng = np.random.default_rng(seed)
    ratios = np.empty(samples)
    step = max(1, _COUNTS_AT_ONCE // len(kinds))
    for start in range(0, samples, step):
        drawn = rng.multinomial(n_prompts, shares, size=min(step, samples - start))
        ratios[start : start + step] = (drawn @ over) / (drawn @ under)
    ratios.sort()
    influence = over - estimate * under  # of each kind, but for a factor
    spread = float(counts @ influence**2)
    acceleration = float(counts @ influence**3) / (6 * spread**1.5) if spread > 0 else 0.0
    return Bootstrap(estimate, n_prompts, ratios, acceleration)


def prompt_numbers(prompts: Ints) -> Ints:
    """The prompts numbered 0, 1, … without gaps.

    >>> prompt_numbers(np.array([7, 3, 7]))
    array([1, 0, 1])
    """
    return np.unique(prompts, return_inverse=True)[1]
