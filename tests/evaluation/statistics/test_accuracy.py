from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy import stats

from polar_ft.evaluation.pairs import Categories, margins
from polar_ft.evaluation.statistics.accuracy import (
    interval_by_prompt,
    macro_metrics,
    margin_metrics,
    subset_metrics,
    wilson_interval,
)


def pair_metrics(chosen, rejected, prompts=None):
    return margin_metrics(margins(chosen, rejected), prompts)


# Few distinct values, so that ties are common, and every kind that is not finite.
scores = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 2.5, math.nan, math.inf, -math.inf]),
    st.floats(min_value=-1e6, max_value=1e6),
)


@st.composite
def scored_pairs(draw, min_pairs=0):
    n = draw(st.integers(min_pairs, 60))
    arrays = npst.arrays(np.float64, n, elements=scores)
    return draw(arrays), draw(arrays)


@pytest.mark.parametrize("n", [1, 2, 5, 30, 1000])
def test_wilson_is_scipys(n):
    for k in {0, 1, n // 3, n - 1, n}:
        expected = stats.binomtest(k, n).proportion_ci(confidence_level=0.95, method="wilson")
        assert wilson_interval(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("k", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_of_no_proportion(k, n):
    with pytest.raises(ValueError, match="no proportion"):
        wilson_interval(k, n)


@settings(deadline=None)
@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_proportion_and_mirrors(k_n):
    k, n = k_n
    low, high = wilson_interval(k, n)
    assert 0 <= low <= k / n <= high <= 1
    mirrored = wilson_interval(n - k, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_every_figure_by_hand():
    #        right  wrong  tie  not finite: NaN, both infinite, one infinite
    chosen = [3.0, -1.0, 0.5, math.nan, math.inf, 1.0]
    rejected = [1.0, 0.0, 0.5, 0.0, math.inf, -math.inf]
    metrics = pair_metrics(chosen, rejected)
    assert (metrics.n_pairs, metrics.n_scored, metrics.n_nonfinite) == (6, 3, 3)
    assert (metrics.n_correct, metrics.n_ties) == (1, 1)
    assert metrics.accuracy == 1 / 3
    assert metrics.accuracy_ties_half == 1.5 / 3
    assert metrics.mean_margin == pytest.approx((2 - 1 + 0) / 3)
    by_hand = (math.log1p(math.exp(-2)) + math.log1p(math.exp(1)) + math.log(2)) / 3
    assert metrics.log_loss == pytest.approx(by_hand)
    # Wilson for 1 of 3 from its definition: the roots p of (1/3 − p)² = z² p (1 − p) / 3.
    z2 = 1.959963984540054**2
    roots = np.roots([1 + z2 / 3, -(2 / 3 + z2 / 3), 1 / 9])
    assert metrics.accuracy_ci95 == pytest.approx(sorted(roots.real))


def test_figures_without_a_scored_pair_are_none():
    for metrics in (pair_metrics([], []), pair_metrics([math.nan], [0.0])):
        assert metrics.n_scored == 0
        assert metrics.accuracy is metrics.accuracy_ci95 is metrics.accuracy_ties_half is None
        assert metrics.mean_margin is metrics.log_loss is None


def test_log_loss_of_a_hopeless_pair_is_its_margin():
    # −log σ(−2000) = log(1 + e²⁰⁰⁰) = 2000, where exp alone overflows.
    assert pair_metrics([0.0], [2000.0]).log_loss == 2000.0


def test_scores_that_differ_by_one_ulp_are_no_tie():
    metrics = pair_metrics([np.nextafter(1.0, 2.0)], [1.0])
    assert (metrics.n_correct, metrics.n_ties) == (1, 0)


@settings(deadline=None)
@given(scored_pairs())
def test_label_swap_gives_one_minus_accuracy_minus_ties(pairs):
    chosen, rejected = pairs
    right, swapped = pair_metrics(chosen, rejected), pair_metrics(rejected, chosen)
    assert right.n_scored == swapped.n_scored
    assert right.n_ties == swapped.n_ties
    if right.n_scored:
        tie_rate = right.n_ties / right.n_scored
        assert swapped.accuracy == pytest.approx(1 - right.accuracy - tie_rate)
        assert swapped.accuracy_ties_half == pytest.approx(1 - right.accuracy_ties_half)
        assert swapped.mean_margin == pytest.approx(-right.mean_margin)
        # softplus(−m) − softplus(m) = −m
        assert right.log_loss - swapped.log_loss == pytest.approx(-right.mean_margin, rel=1e-9, abs=1e-6)


@settings(deadline=None)
@given(scored_pairs(min_pairs=1), st.randoms(use_true_random=False))
def test_order_of_the_pairs_and_names_of_the_prompts_change_nothing(pairs, random):
    margin = margins(*pairs)
    subsets = [random.choice("abc") for _ in margin]
    prompts = np.array([random.randrange(8) for _ in margin])
    order = list(range(len(margin)))
    random.shuffle(order)
    other_names = np.array(random.sample(range(100), 8))
    before = subset_metrics(margin, Categories.from_values(subsets), prompts)
    after = subset_metrics(
        margin[order], Categories.from_values([subsets[i] for i in order]), other_names[prompts[order]]
    )
    assert list(before) == list(after)
    for one, other in [
        *((before[name], after[name]) for name in before),
        (macro_metrics(before), macro_metrics(after)),
        (margin_metrics(margin, prompts), margin_metrics(margin[order], other_names[prompts[order]])),
    ]:
        for figure, value in one.model_dump().items():
            # Sums of floats depend on their order in the last digits.
            assert getattr(other, figure) == (value if value is None else pytest.approx(value, abs=1e-6))


@settings(deadline=None)
@given(scored_pairs(min_pairs=1), st.integers(2, 4))
def test_duplicated_pairs_narrow_the_interval_alone(pairs, times):
    once = pair_metrics(*pairs)
    more = pair_metrics(np.tile(pairs[0], times), np.tile(pairs[1], times))
    assert more.n_pairs == times * once.n_pairs
    if once.n_scored:
        assert more.accuracy == pytest.approx(once.accuracy)
        assert more.log_loss == pytest.approx(once.log_loss)
        low, high = once.accuracy_ci95
        assert low - 1e-12 <= more.accuracy_ci95[0]
        assert more.accuracy_ci95[1] <= high + 1e-12


@settings(deadline=None)
@given(scored_pairs(min_pairs=1))
def test_pairs_are_of_exactly_one_kind(pairs):
    metrics = pair_metrics(*pairs)
    wrong = pair_metrics(pairs[1], pairs[0]).n_correct
    assert metrics.n_correct + metrics.n_ties + wrong == metrics.n_scored
    assert metrics.n_scored + metrics.n_nonfinite == metrics.n_pairs


@settings(deadline=None)
@given(scored_pairs(min_pairs=1), st.integers(2, 4), st.randoms(use_true_random=False))
def test_pairs_copied_within_their_prompts_change_no_figure_by_prompt(pairs, times, random):
    margin = margins(*pairs)
    prompts = np.array([random.randrange(6) for _ in margin])
    once = margin_metrics(margin, prompts)
    more = margin_metrics(np.repeat(margin, times), np.repeat(prompts, times))
    assert more.n_prompts == once.n_prompts
    if once.accuracy_ci95_by_prompt is not None:
        assert more.accuracy_ci95_by_prompt == pytest.approx(once.accuracy_ci95_by_prompt)
    assert (more.accuracy_ci95_by_prompt is None) == (once.n_scored == 0)


def test_by_prompt_only_where_prompts_have_several_pairs():
    margin = np.array([1.0, -1.0, 2.0, np.nan])
    assert margin_metrics(margin).n_prompts is None
    # Prompt 0 has two pairs, but one of them is not scored.
    alone = margin_metrics(margin, np.array([0, 1, 2, 0]))
    assert (alone.n_prompts, alone.accuracy_ci95_by_prompt) == (3, None)
    assert alone.interval == alone.accuracy_ci95
    shared = margin_metrics(margin, np.array([0, 0, 2, 0]))
    assert shared.n_prompts == 2
    assert shared.interval == shared.accuracy_ci95_by_prompt != shared.accuracy_ci95


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_prompts_that_all_agree_are_as_many_trials(share):
    credit = np.tile([share >= 0.5, share == 1.0], 10)  # ten prompts of two pairs
    n_prompts, interval = interval_by_prompt(credit, np.repeat(np.arange(10), 2))
    assert n_prompts == 10
    assert interval == wilson_interval(10 * share, 10)


def test_one_prompt_is_one_trial():
    # Three of four pairs of the only prompt.
    assert interval_by_prompt([1, 1, 1, 0], np.zeros(4, int)) == (1, wilson_interval(0.75, 1))


def test_prompts_of_another_length():
    with pytest.raises(ValueError, match="2 prompts for 1 pairs"):
        margin_metrics(np.ones(1), np.zeros(2, int))


def test_macro_by_hand():
    #  a: 2 of 2, b: 1 of 4, c: nothing finite
    margin = np.array([1, 1, 1, -1, -1, -1, math.nan])
    subsets = subset_metrics(margin, Categories.from_values(list("aabbbbc")))
    assert list(subsets) == ["a", "b", "c"]
    assert [subset.n_pairs for subset in subsets.values()] == [2, 4, 1]
    macro = macro_metrics(subsets)
    assert macro.accuracy == (1 + 1 / 4) / 2
    assert (macro.n_subsets, macro.n_subsets_left_out) == (2, 1)
    # Square-and-add of the two Wilson intervals around 1 and 1/4.
    (low_a, high_a), (low_b, high_b) = wilson_interval(2, 2), wilson_interval(1, 4)
    low = 0.625 - math.hypot(1 - low_a, 0.25 - low_b) / 2
    high = 0.625 + math.hypot(high_a - 1, high_b - 0.25) / 2
    assert macro.accuracy_ci95 == pytest.approx((low, high))
    assert macro.accuracy_ci95_by_prompt is None
    assert macro.interval == macro.accuracy_ci95
    assert macro.mean_margin == pytest.approx((1 - 0.5) / 2)


def test_macro_by_prompt_takes_each_subsets_own_interval():
    # a: two prompts of two pairs; b: a prompt a pair, for which Wilson's interval stands.
    margin, prompts = np.array([1, 1, 1, -1, 1, -1, -1.0]), np.array([0, 0, 1, 1, 2, 3, 4])
    subsets = subset_metrics(margin, Categories.from_values(list("aaaabbb")), prompts)
    low_a, high_a = subsets["a"].accuracy_ci95_by_prompt
    low_b, high_b = wilson_interval(1, 3)
    mean = (3 / 4 + 1 / 3) / 2
    low = mean - math.hypot(3 / 4 - low_a, 1 / 3 - low_b) / 2
    high = mean + math.hypot(high_a - 3 / 4, high_b - 1 / 3) / 2
    assert macro_metrics(subsets).interval == pytest.approx((low, high))


def test_macro_without_a_scored_subset():
    macro = macro_metrics(subset_metrics(np.array([np.nan]), Categories.from_values(["a"])))
    assert (macro.n_subsets, macro.n_subsets_left_out, macro.accuracy, macro.interval) == (0, 1, None, None)


def test_macro_of_one_subset_is_that_subset():
    metrics = margin_metrics(np.array([1.0, 1.0, -1.0, 0.0]))
    macro = macro_metrics({"only": metrics})
    assert macro.accuracy_ci95 == pytest.approx(metrics.accuracy_ci95)
    for figure in ("accuracy", "accuracy_ties_half", "mean_margin", "log_loss"):
        assert getattr(macro, figure) == pytest.approx(getattr(metrics, figure))


def test_macro_interval_covers_95_percent():
    """Three subsets of 12, 40 and 200 pairs with true accuracies 0.9, 0.7 and 0.55, drawn 4000 times."""
    rng = np.random.default_rng(0)
    sizes, truth = (12, 40, 200), (0.9, 0.7, 0.55)
    covered = 0
    for _ in range(4000):
        subsets = {}
        for name, n, p in zip("abc", sizes, truth, strict=True):
            subsets[name] = margin_metrics(np.where(rng.random(n) < p, 1.0, -1.0))
        low, high = macro_metrics(subsets).accuracy_ci95
        covered += low <= np.mean(truth) <= high
    assert 0.93 <= covered / 4000 <= 0.97
