from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from polar_ft.evaluation.pairs import Ranking
from polar_ft.evaluation.statistics.accuracy import interval_by_prompt, wilson_interval
from polar_ft.evaluation.statistics.ranking import best_of_n, ranking_figures


def ranking(model_scores, given_scores, *, prompt=0, subset=None):
    return Ranking(
        "row",
        subset,
        prompt,
        np.array(model_scores, float),
        np.array(given_scores, float),
        [{} for _ in given_scores],
    )


@pytest.mark.parametrize(
    ("model", "given_scores", "credit"),
    [
        ([3, 2, 1], [9, 5, 1], 1.0),
        ([1, 2, 3], [9, 5, 1], 0.0),
        ([3, 3, 1], [9, 5, 1], 1 / 2),  # level with one other
        ([3, 3, 3, 3], [9, 5, 1, 0], 1 / 4),  # constant scores: chance
        ([1, 2, 2], [9, 5, 1], 0.0),  # the best is not at the top
        ([3, 2, 1], [9, 9, 1], 1.0),  # two are best, one of them is found
        ([3, 1, 3], [9, 9, 1], 1 / 2),
        ([7], [0], 1.0),
    ],
)
def test_credit_for_the_best(model, given_scores, credit):
    assert best_of_n(np.array(model, float), np.array(given_scores, float))[0] == credit


def test_every_figure_by_hand():
    figures = ranking_figures(
        [
            # one of three pairs swapped: τ = (2 − 1) / 3; ranks 1 2 3 and 2 1 3: ρ = 1 − 6 · 2 / (3 · 8)
            ranking([2, 3, 1], [3, 2, 1], prompt=0, subset="a"),
            ranking([5, 5, 1, 0], [9, 0, 0, 0], prompt=1, subset="a"),
            ranking([1, 1], [1, 0], prompt=2, subset="b"),  # constant: no correlation
            ranking([1, math.nan], [1, 0], prompt=3, subset="b"),
            ranking([2, 1], [1, 0], prompt=4),
        ]
    )
    assert list(figures.subsets) == ["a", "b"]
    overall, a, b = figures.overall, figures.subsets["a"], figures.subsets["b"]
    assert (overall.n_rows, overall.n_scored, overall.n_nonfinite) == (5, 4, 1)
    assert (b.n_rows, b.n_scored, b.n_nonfinite) == (2, 1, 1)
    assert overall.best_of_n == (0 + 1 / 2 + 1 / 2 + 1) / 4
    assert overall.best_of_n_ci95 == wilson_interval(2, 4)
    assert overall.chance == pytest.approx((1 / 3 + 1 / 4 + 1 / 2 + 1 / 2) / 4)
    assert overall.n_candidates == (3 + 4 + 2 + 2) / 4
    # Second row: model pairs 01 level, given 12, 13, 23 level. Of six pairs 02 and 03 agree, so
    # τ-b = 2 / √(5 · 3); mean ranks of the model 1.5 1.5 3 4, of the data 1 3 3 3.
    rho = stats.pearsonr([1.5, 1.5, 3, 4], [1, 3, 3, 3]).statistic
    assert a.kendall_tau_b == pytest.approx((1 / 3 + 2 / math.sqrt(15)) / 2)
    assert a.spearman == pytest.approx((0.5 + rho) / 2)
    assert (a.n_correlated, b.n_correlated, overall.n_correlated) == (2, 0, 3)
    assert b.kendall_tau_b is b.spearman is None
    assert overall.kendall_tau_b == pytest.approx((1 / 3 + 2 / math.sqrt(15) + 1) / 3)


def test_rows_of_one_prompt_are_drawn_together():
    rows = [ranking([1, 0] if n % 3 else [0, 1], [1, 0], prompt=n // 2) for n in range(20)]
    credit = [float(n % 3 > 0) for n in range(20)]
    expected = interval_by_prompt(credit, np.arange(20) // 2, samples=500, seed=4)[1]
    assert ranking_figures(rows, samples=500, seed=4).overall.best_of_n_ci95 == expected


def test_nothing_scored():
    figures = ranking_figures([ranking([math.nan, 0], [1, 0], subset="a")])
    for metrics in (figures.overall, figures.subsets["a"]):
        assert (metrics.n_rows, metrics.n_scored, metrics.n_correlated) == (1, 0, 0)
        assert metrics.best_of_n is metrics.best_of_n_ci95 is metrics.chance is metrics.spearman is None


scores = st.integers(-2, 2).map(float)
score_rows = st.lists(
    st.integers(2, 6).flatmap(
        lambda n: st.tuples(
            st.lists(scores, min_size=n, max_size=n), st.lists(scores, min_size=n, max_size=n)
        )
    ),
    min_size=1,
    max_size=12,
)


@given(score_rows)
def test_correlations_are_scipys(rows):
    figures = ranking_figures([ranking(*row, prompt=n) for n, row in enumerate(rows)]).overall
    varied = [(model, good) for model, good in rows if np.ptp(model) > 0 and np.ptp(good) > 0]
    assert figures.n_correlated == len(varied)
    if varied:
        tau = [stats.kendalltau(model, good, variant="b").statistic for model, good in varied]
        rho = [stats.spearmanr(model, good).statistic for model, good in varied]
        assert figures.kendall_tau_b == pytest.approx(np.mean(tau))
        assert figures.spearman == pytest.approx(np.mean(rho))


@given(score_rows, st.randoms(use_true_random=False))
def test_order_of_rows_and_candidates_changes_nothing(rows, random):
    before = ranking_figures([ranking(*row, prompt=n) for n, row in enumerate(rows)])
    shuffled = []
    for n, (model, good) in enumerate(rows):
        order = random.sample(range(len(model)), len(model))
        shuffled.append(ranking([model[i] for i in order], [good[i] for i in order], prompt=n))
    random.shuffle(shuffled)
    after = ranking_figures(shuffled)
    for figure, value in before.overall.model_dump().items():
        assert getattr(after.overall, figure) == (value if value is None else pytest.approx(value))


@given(score_rows)
def test_reversed_scores_reverse_the_correlations(rows):
    one = ranking_figures([ranking(*row) for row in rows]).overall
    other = ranking_figures([ranking([-score for score in model], good) for model, good in rows]).overall
    if one.n_correlated:
        assert other.kendall_tau_b == pytest.approx(-one.kendall_tau_b)
        assert other.spearman == pytest.approx(-one.spearman)


def test_constant_scores_get_chance():
    rows = [ranking([0] * n, [1] * best + [0] * (n - best)) for n, best in [(2, 1), (4, 1), (5, 2)]]
    metrics = ranking_figures(rows).overall
    assert metrics.best_of_n == metrics.chance == pytest.approx((1 / 2 + 1 / 4 + 2 / 5) / 3)


def test_more_comparisons_than_fit_at_once(monkeypatch):
    rng = np.random.default_rng(0)
    rows = [ranking(rng.normal(size=5), rng.normal(size=5), prompt=n) for n in range(50)]
    whole = ranking_figures(rows)
    monkeypatch.setattr("polar_ft.evaluation.statistics.ranking._COMPARISONS_AT_ONCE", 60)
    assert ranking_figures(rows) == whole
