from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from polar_ft.evaluation.statistics.accuracy import interval_by_prompt, wilson_interval
from polar_ft.evaluation.statistics.resampling import Bootstrap, bootstrap_ratio


def test_the_samples_have_the_distribution_of_all_resamples():
    """Three prompts with 1/1, 1/3 and 0/2 right: all 27 samples with replacement, enumerated."""
    right, n = np.array([1, 1, 0]), np.array([1, 3, 2])
    exact = [
        right[list(drawn)].sum() / n[list(drawn)].sum() for drawn in itertools.product(range(3), repeat=3)
    ]
    credit, prompts = [1, 1, 0, 0, 0, 0], np.array([0, 1, 1, 1, 2, 2])
    boot = bootstrap_ratio(credit, np.ones(6), prompts, samples=200_000)
    assert (boot.estimate, boot.n_prompts) == (2 / 6, 3)
    for value, count in zip(*np.unique(np.round(exact, 9), return_counts=True), strict=True):
        share = np.mean(np.isclose(boot.samples, value))
        assert share == pytest.approx(count / 27, abs=0.005)  # 4.4 standard errors at most


def test_kinds_give_the_interval_of_drawing_prompts_one_by_one():
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 7, 80)
    prompts = np.repeat(np.arange(80), sizes)
    credit = rng.random(len(prompts)) < np.repeat(rng.beta(2, 1, 80), sizes)
    right = np.bincount(prompts, credit)
    drawn = rng.integers(0, 80, size=(40_000, 80))
    ratios = right[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    boot = bootstrap_ratio(credit, np.ones(len(prompts)), prompts, samples=40_000)
    levels = [0.025, 0.25, 0.5, 0.75, 0.975]
    assert np.quantile(boot.samples, levels) == pytest.approx(np.quantile(ratios, levels), abs=2e-3)


def test_interval_is_scipys_bca_but_for_the_quantile():
    """scipy knows no clusters and no t quantile: one pair a prompt, and so many that t is normal."""
    values = np.random.default_rng(5).gamma(0.5, size=2000)  # skewed, so that a and z0 matter
    boot = bootstrap_ratio(values, np.ones(2000), samples=20_000)
    reference = stats.bootstrap(
        (values,), np.mean, method="BCa", n_resamples=20_000, batch=500, rng=np.random.default_rng(6)
    ).confidence_interval
    width = reference.high - reference.low
    assert boot.interval() == pytest.approx((reference.low, reference.high), abs=0.04 * width)


def test_few_prompts_widen_the_interval_by_students_t():
    """Symmetric samples: no bias, no acceleration; levels are Φ(±√(C/(C−1))·t) of a uniform spread."""
    samples = np.linspace(-1, 1, 100_001)
    low, high = Bootstrap(0.0, 5, samples, 0.0).interval()
    t = 2.7764451051977934  # 97.5 % of Student's t with 4 degrees of freedom, from a table
    expected = 2 * stats.norm.cdf(np.sqrt(5 / 4) * t) - 1
    assert (low, high) == pytest.approx((-expected, expected), abs=1e-4)


@pytest.mark.parametrize(
    ("n_prompts", "pairs", "accuracy"), [(15, (2, 6), 0.7), (60, (4, 4), 0.9), (200, (1, 8), 0.75)]
)
def test_interval_by_prompt_covers_95_percent(n_prompts, pairs, accuracy):
    """Pairs of a prompt share its difficulty (beta, intraclass correlation 0.3); 1500 data sets each.

    With 1500, a true coverage of 95 % leaves 93 to 97 % in one of 3000 trials. Wilson's interval, which
    takes pairs as independent, must fail on the same data: else there is nothing to see here.
    """
    rng = np.random.default_rng(0)
    strength = 1 / 0.3 - 1
    covered = covered_wilson = 0
    for seed in range(1500):
        sizes = rng.integers(pairs[0], pairs[1] + 1, n_prompts)
        prompts = np.repeat(np.arange(n_prompts), sizes)
        ease = rng.beta(accuracy * strength, (1 - accuracy) * strength, n_prompts)
        credit = rng.random(len(prompts)) < ease[prompts]
        low, high = interval_by_prompt(credit, prompts, samples=1000, seed=seed)[1]
        covered += low <= accuracy <= high
        low, high = wilson_interval(int(credit.sum()), len(credit))
        covered_wilson += low <= accuracy <= high
    assert 0.93 <= covered / 1500 <= 0.97
    assert covered_wilson / 1500 < 0.9


def test_p_value_by_hand():
    """Estimate 0.5 of 9 prompts; 1 of 9 samples is 0.5 or more away, and so 2 of 10 with the one more."""
    boot = Bootstrap(0.5, 9, np.array([0.0, 0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]), 0.0)
    t = stats.norm.ppf(0.1) / np.sqrt(9 / 8)
    assert boot.p_value() == pytest.approx(2 * stats.t.cdf(t, 8))


@pytest.mark.parametrize("n_prompts", [20, 100])
def test_p_value_raises_a_false_alarm_in_5_percent(n_prompts):
    """No difference in truth: gains of 3 pairs that share their prompt's mean of 0; 1000 data sets."""
    rng = np.random.default_rng(1)
    prompts = np.repeat(np.arange(n_prompts), 3)
    alarms = 0
    for seed in range(1000):
        gain = np.sign(rng.normal(size=n_prompts)[prompts] + rng.normal(size=len(prompts)))
        gain[rng.random(len(gain)) < 0.5] = 0
        boot = bootstrap_ratio(gain, np.ones(len(gain)), prompts, seed=seed)
        alarms += boot.p_value() < 0.05
        low, high = boot.interval()
        if boot.p_value() < 0.02 or boot.p_value() > 0.1:
            assert (boot.p_value() < 0.05) == (low > 0 or high < 0)
    assert 0.03 <= alarms / 1000 <= 0.07


def test_p_value_is_symmetric_and_never_0():
    rng = np.random.default_rng(2)
    gain = rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.7, 0.2], size=200)
    p, mirrored = (bootstrap_ratio(sign * gain, np.ones(200)).p_value() for sign in (1, -1))
    assert p == pytest.approx(mirrored, abs=0.01)
    all_but_one = np.r_[np.ones(199), -1.0]
    assert 0 < bootstrap_ratio(all_but_one, np.ones(200)).p_value() < 0.001
    assert bootstrap_ratio([1.0, -1.0, 1.0, -1.0], np.ones(4)).p_value() == pytest.approx(1.0)


def test_more_kinds_than_fit_at_once(monkeypatch):
    values = np.random.default_rng(0).normal(size=500)
    whole = bootstrap_ratio(values, np.ones(500), samples=100).samples
    monkeypatch.setattr("polar_ft.evaluation.statistics.resampling._COUNTS_AT_ONCE", 1500)  # 3 samples
    parts = bootstrap_ratio(values, np.ones(500), samples=100).samples
    assert parts == pytest.approx(whole, abs=1e-12)  # the same draws, summed in another order


def test_no_pairs():
    with pytest.raises(ValueError, match="no pairs"):
        bootstrap_ratio([], [])
