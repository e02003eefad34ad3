from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats
from sklearn.linear_model import LogisticRegression

from polar_ft.evaluation.pairs import PairTable
from polar_ft.evaluation.statistics.accuracy import wilson_interval
from polar_ft.evaluation.statistics.length import correlation, length_bias, length_controlled


def ints(*values):
    return np.array(values, np.int64)


def test_groups_by_hand():
    # chosen longer: right, wrong; rejected longer: tie; equal: right; longer, but not scored
    table = PairTable(
        np.array([2.0, 0.0, 1.0, 5.0, math.nan]),
        np.array([1.0, 1.0, 1.0, 2.0, 0.0]),
        chosen_chars=ints(10, 30, 5, 7, 100),
        rejected_chars=ints(4, 20, 9, 7, 1),
    )
    bias = length_bias(table, n_groups=2)
    assert (bias.unit, bias.n_pairs) == ("characters", 4)
    longer = bias.chosen_longer
    assert (longer.low, longer.high, longer.n_pairs, longer.accuracy) == (6, 10, 2, 0.5)
    assert longer.accuracy_ci95 == wilson_interval(1, 2)
    shorter = bias.rejected_longer
    assert (shorter.low, shorter.high, shorter.accuracy, shorter.accuracy_ties_half) == (-4, -4, 0.0, 0.5)
    assert (bias.equal_length.n_pairs, bias.equal_length.accuracy) == (1, 1.0)
    # differences 6, 10, −4, 0: the lower and the upper half
    assert [(g.low, g.high, g.n_pairs) for g in bias.by_difference] == [(-4, 0, 2), (6, 10, 2)]
    assert bias.margin_and_difference.pearson == pytest.approx(
        stats.pearsonr([1.0, -1.0, 0.0, 3.0], [6, 10, -4, 0]).statistic
    )
    assert bias.score_and_length.spearman == pytest.approx(
        stats.spearmanr([2, 0, 1, 5, 1, 1, 1, 2], [10, 30, 5, 7, 4, 20, 9, 7]).statistic
    )


def test_tokens_where_characters_are_not_known():
    scores = np.array([1.0, 0.0])
    bias = length_bias(PairTable(scores, 1 - scores, chosen_tokens=ints(3, 1), rejected_tokens=ints(1, 2)))
    assert (bias.unit, bias.chosen_longer.n_pairs, bias.equal_length.low) == ("tokens", 1, None)
    assert length_bias(PairTable(scores, 1 - scores)) is None


def test_nothing_scored():
    nan = np.array([math.nan])
    assert length_bias(PairTable(nan, nan, chosen_chars=ints(1), rejected_chars=ints(2))) is None


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=60), st.integers(1, 12))
def test_groups_hold_every_pair_once_in_order(differences, n_groups):
    chosen = ints(*differences) + 10
    scores = np.zeros(len(chosen))
    groups = length_bias(
        PairTable(scores, scores, chosen_chars=chosen, rejected_chars=np.full(len(chosen), 10)), n_groups
    ).by_difference
    assert sum(group.n_pairs for group in groups) == len(differences)
    assert len(groups) <= n_groups
    edges = [(group.low, group.high) for group in groups]
    assert all(one[1] < other[0] for one, other in itertools.pairwise(edges))


def test_many_pairs_make_groups_of_equal_size():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=10_000)
    table = PairTable(
        scores, 0 * scores, chosen_chars=rng.permutation(10_000), rejected_chars=np.zeros(10_000, int)
    )
    assert [group.n_pairs for group in length_bias(table).by_difference] == [1000] * 10


@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=2, max_size=40))
def test_correlation_is_scipys(points):
    x, y = np.array(points, float).T
    figures = correlation(x, y)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert figures.pearson is figures.spearman is None
    else:
        assert figures.pearson == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-9)
        assert figures.spearman == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)


def biased_model(n=20_000, intercept=0.8, slope=1.5, seed=0):
    """A model that is right with probability σ(intercept + slope · tanh(d / s))."""
    rng = np.random.default_rng(seed)
    difference = rng.normal(100, 300, n).round()
    chance = special.expit(intercept + slope * np.tanh(difference / difference.std()))
    return np.where(rng.random(n) < chance, 1.0, -1.0), difference


def test_length_controlled_accuracy_finds_the_truth():
    margin, difference = biased_model()
    fit = length_controlled(margin, difference)
    assert fit.accuracy == pytest.approx(special.expit(0.8), abs=0.01)
    assert fit.length_effect == pytest.approx(1.5, abs=0.1)
    assert np.mean(margin > 0) > fit.accuracy + 0.02  # longer chosen candidates flatter the model
    assert fit.ci95[0] < special.expit(0.8) < fit.ci95[1]


def test_length_controlled_is_scikit_learns_regression():
    margin, difference = biased_model(n=300)
    bias = np.tanh(difference / difference.std())[:, None]
    model = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(bias, margin > 0)
    fit = length_controlled(margin, difference)
    assert fit.accuracy == pytest.approx(model.predict_proba([[0.0]])[0, 1], abs=1e-6)
    assert fit.length_effect == pytest.approx(model.coef_[0, 0], abs=1e-5)


def test_length_controlled_interval_covers_95_percent():
    """40 prompts of 5 pairs that share their difficulty: 800 data sets, true value from a large one."""
    rng = np.random.default_rng(0)

    def draw(n_prompts):
        prompts = np.repeat(np.arange(n_prompts), 5)
        difference = rng.normal(50, 200, len(prompts))
        latent = 0.7 + 1.0 * np.tanh(difference / 200) + rng.normal(0, 1, n_prompts)[prompts]
        return np.where(rng.random(len(prompts)) < special.expit(latent), 1.0, -1.0), difference, prompts

    truth = length_controlled(*draw(200_000)).accuracy
    covered = alone = 0
    for _ in range(800):
        margin, difference, prompts = draw(40)
        low, high = length_controlled(margin, difference, prompts).ci95
        covered += low <= truth <= high
        low, high = length_controlled(margin, difference).ci95
        alone += low <= truth <= high
    assert 0.93 <= covered / 800 <= 0.97
    assert alone / 800 < 0.93  # pairs taken as independent


def test_equal_lengths_leave_the_accuracy():
    fit = length_controlled(np.array([1.0, 1.0, 0.0, -1.0]), np.zeros(4))
    assert fit.accuracy == pytest.approx(2.5 / 4)
    assert fit.length_effect is None


@pytest.mark.parametrize(("margin", "accuracy"), [([1.0, 2.0], 1.0), ([-1.0, -2.0], 0.0)])
def test_all_right_or_all_wrong(margin, accuracy):
    fit = length_controlled(np.array(margin), ints(3, -4))
    assert (fit.accuracy, fit.ci95, fit.length_effect) == (accuracy, None, None)


def test_length_alone_decides():
    """Perfect separation by length: finite, and half at equal length by symmetry."""
    fit = length_controlled(np.array([1.0] * 50 + [-1.0] * 50), ints(*[10] * 50, *[-10] * 50))
    assert fit.accuracy == pytest.approx(0.5)
    assert 2 < fit.length_effect < 20


@given(
    st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 1.0]), st.integers(-50, 50)), min_size=1, max_size=40),
    st.randoms(use_true_random=False),
)
def test_swapping_labels_mirrors_and_order_changes_nothing(pairs, random):
    margin, difference = np.array(pairs).T
    fit = length_controlled(margin, difference)
    swapped = length_controlled(-margin, -difference)
    assert swapped.accuracy == pytest.approx(1 - fit.accuracy, abs=1e-6)
    order = list(range(len(pairs)))
    random.shuffle(order)
    shuffled = length_controlled(margin[order], difference[order])
    assert shuffled.accuracy == pytest.approx(fit.accuracy, abs=1e-6)
    assert (shuffled.ci95 is None) == (fit.ci95 is None)
