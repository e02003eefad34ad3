"""Ranked rows: is the best candidate found among N, and is the order right?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy  # its parts load when they are first used
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from polar_ft.evaluation.pairs import Floats, Ranking
from polar_ft.evaluation.statistics.accuracy import interval_by_prompt, wilson_interval
from polar_ft.evaluation.statistics.resampling import Interval

# Comparisons held at once: 64 MB.
_COMPARISONS_AT_ONCE = 8_000_000


class RankingMetrics(BaseModel):
    """Figures of a set of ranked rows; a figure is None where no row has it.

    Attributes:
        n_rows: All ranked rows.
        n_scored: Rows whose candidates all have finite scores: the denominator of `best_of_n`.
        n_nonfinite: The other rows.
        n_candidates: Mean number of candidates of the scored rows.
        best_of_n: How often the candidate that the model scores highest is one of the best: a row where the
            model puts k candidates level at the top counts as the share of these k that are best.
        best_of_n_ci95: 95 % interval of it: Wilson's, or by prompt where prompts have several rows.
        chance: `best_of_n` of drawing a candidate at random.
        kendall_tau_b: Mean over rows of Kendall's τ-b of the model's scores with the given ones.
        spearman: Mean over rows of Spearman's ρ, likewise.
        n_correlated: Rows that the two means are over: neither the model nor the data ranks all candidates
            the same.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_rows: int
    n_scored: int
    n_nonfinite: int
    n_candidates: float | None
    best_of_n: float | None
    best_of_n_ci95: Interval | None
    chance: float | None
    kendall_tau_b: float | None
    spearman: float | None
    n_correlated: int


class RankingFigures(BaseModel):
    """`RankingMetrics` of all rows and of each subset (empty where no row has one)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    overall: RankingMetrics
    subsets: dict[str, RankingMetrics]


def ranking_figures(rankings: Sequence[Ranking], **bootstrap: int) -> RankingFigures:
    """Figures of ranked rows, over all and by subset in alphabetical order.

    Args:
        rankings: The ranked rows, at least one.
        bootstrap: `samples` and `seed` of `bootstrap_ratio`.

    Kendall's τ-b: M. G. Kendall, "The treatment of ties in ranking problems", Biometrika 33 (1945).

    The model puts the best candidate second and swaps one of three pairs: τ = (2 − 1) / 3. In the second row
    it has two candidates level at the top, of which one is the best:

    >>> rows = [
    ...     Ranking("r1", None, 0, np.array([2.0, 3.0, 1.0]), np.array([3.0, 2.0, 1.0]), [{}] * 3),
    ...     Ranking("r2", None, 1, np.array([5.0, 5.0, 1.0]), np.array([9.0, 0.0, 0.0]), [{}] * 3)]
    >>> figures = ranking_figures(rows).overall
    >>> figures.best_of_n, round(figures.chance, 3), figures.n_candidates
    (0.25, 0.333, 3.0)
    >>> round(ranking_figures(rows[:1]).overall.kendall_tau_b, 3)
    0.333
    """
    scored = np.array([bool(np.isfinite(row.model_scores).all()) for row in rankings])
    kept = [row for row, finite in zip(rankings, scored, strict=True) if finite]
    columns = _Columns(kept)
    place = np.cumsum(scored) - 1  # row → its place among the scored ones
    by_subset: dict[str, list[int]] = {}
    for number, row in enumerate(rankings):
        if row.subset is not None:
            by_subset.setdefault(row.subset, []).append(number)

    def metrics(rows: NDArray[np.intp]) -> RankingMetrics:
        return columns.metrics(len(rows), place[rows[scored[rows]]], **bootstrap)

    return RankingFigures(
        overall=metrics(np.arange(len(rankings))),
        subsets={name: metrics(np.array(by_subset[name])) for name in sorted(by_subset)},
    )


def best_of_n(model_scores: Floats, given: Floats) -> tuple[float, float]:
    """Credit of one row for its best candidate, and the credit that a draw at random expects.

    The k candidates that the model has level at the top share one draw: the credit is the share of them that
    are best by the data, so 1/k for one best among them, and constant scores get chance.

    >>> best_of_n(np.array([5.0, 5.0, 1.0]), np.array([9.0, 0.0, 0.0]))[0]
    0.5
    """
    best = given == given.max()
    return float(best[model_scores == model_scores.max()].mean()), float(best.mean())


class _Columns:
    """Figures of each scored row, `[rows]`."""

    def __init__(self, rankings: list[Ranking]) -> None:
        credits = [best_of_n(row.model_scores, row.given) for row in rankings]
        self.credit, self.chance = np.array(credits).reshape(-1, 2).T
        self.prompts = np.array([row.prompt for row in rankings], dtype=np.int64)
        self.sizes = np.array([len(row.given) for row in rankings], dtype=np.int64)
        self.tau, self.rho = _correlations(rankings, self.sizes)

    def metrics(self, n_rows: int, at: NDArray[np.intp], **bootstrap: int) -> RankingMetrics:
        n = len(at)
        credit, tau, rho = self.credit[at], self.tau[at], self.rho[at]
        correlated = ~np.isnan(tau)
        interval = None
        if n:
            _, by_prompt = interval_by_prompt(credit, self.prompts[at], **bootstrap)
            interval = by_prompt or wilson_interval(float(credit.sum()), n)
        return RankingMetrics(
            n_rows=n_rows,
            n_scored=n,
            n_nonfinite=n_rows - n,
            n_candidates=_mean(self.sizes[at]),
            best_of_n=_mean(credit),
            best_of_n_ci95=interval,
            chance=_mean(self.chance[at]),
            kendall_tau_b=_mean(tau[correlated]),
            spearman=_mean(rho[correlated]),
            n_correlated=int(np.count_nonzero(correlated)),
        )


def _correlations(rankings: list[Ranking], sizes: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Kendall's τ-b and Spearman's ρ of each row, NaN where a side is constant; rows of one size at once."""
    tau, rho = np.full(len(rankings), np.nan), np.full(len(rankings), np.nan)
    for size in np.unique(sizes).tolist():
        rows = np.flatnonzero(sizes == size)
        for part in np.array_split(rows, -(-len(rows) * size * size // _COMPARISONS_AT_ONCE)):
            model = np.array([rankings[row].model_scores for row in part])  # [rows, candidates]
            given = np.array([rankings[row].given for row in part])
            tau[part] = _cosine(_signs(model), _signs(given))
            rho[part] = _cosine(_centred_ranks(model), _centred_ranks(given))
    return tau, rho


def _signs(values: Floats) -> Floats:
    """Which of each two candidates is better: −1, 0 or 1, `[rows, candidate pairs]`."""
    first, second = np.triu_indices(values.shape[1], k=1)
    return np.sign(values[:, second] - values[:, first])


def _centred_ranks(values: Floats) -> Floats:
    ranks = scipy.stats.rankdata(values, axis=1)
    return ranks - ranks.mean(axis=1, keepdims=True)


def _cosine(one: Floats, other: Floats) -> Floats:
    """Σ xy / √(Σ x² Σ y²) of each row; both coefficients are this, of signs and of centred ranks."""
    norm = np.sqrt(np.sum(one * one, axis=1) * np.sum(other * other, axis=1))
    with np.errstate(invalid="ignore"):
        return np.sum(one * other, axis=1) / norm


def _mean(values: NDArray[np.float64] | NDArray[np.int64]) -> float | None:
    return float(values.mean()) if len(values) else None
