from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, special
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from polar_ft.evaluation.statistics.accuracy import wilson_interval
from polar_ft.evaluation.statistics.calibration import calibration, reliability

margin_lists = st.lists(st.floats(-20, 20), min_size=1, max_size=50).map(np.array)


def simulated(n=5000, scale=1.0, seed=0):
    """Margins whose σ is the chance of being right, times `scale`."""
    rng = np.random.default_rng(seed)
    margin = rng.normal(0, 2, n)
    return scale * np.where(rng.random(n) < special.expit(margin), margin, -margin)


def test_every_figure_by_hand():
    # Confidences 0.9 (right), 0.9 (wrong), 0.7 (right), 0.5 (tie), one not finite.
    margin = np.array([math.log(9), -math.log(9), math.log(7 / 3), 0.0, math.nan])
    figures = calibration(margin, n_bins=4)  # edges 0.5, 0.625, 0.75, 0.875, 1
    assert figures.n_pairs == 4
    assert [(b.n_pairs, b.accuracy) for b in figures.bins] == [(1, 0.5), (1, 1.0), (0, None), (2, 0.5)]
    assert [b.confidence for b in figures.bins if b.n_pairs] == pytest.approx([0.5, 0.7, 0.9])
    assert figures.bins[3].accuracy_ci95 == wilson_interval(1, 2)
    assert [b.low for b in figures.bins] == [0.5, 0.625, 0.75, 0.875]
    assert figures.bins[3].high == 1.0
    # off by 0, 0.3 and 0.4, the last for two pairs
    assert figures.ece == pytest.approx((0 + 0.3 + 2 * 0.4) / 4)
    assert figures.brier == pytest.approx((0.1**2 + 0.9**2 + 0.3**2 + 0.5**2) / 4)
    assert figures.log_loss == pytest.approx(-math.log(0.9 * 0.1 * 0.7 * 0.5) / 4)


def test_agrees_with_scikit_learn():
    margin = simulated()
    # scikit-learn wants both labels: half of the pairs are written with the rejected candidate first.
    label = np.arange(len(margin)) % 2
    probability = special.expit(np.where(label == 1, margin, -margin))
    figures = calibration(margin)
    assert figures.brier == pytest.approx(brier_score_loss(label, probability))
    assert figures.log_loss == pytest.approx(log_loss(label, probability))
    # Twenty bins over [0, 1], of which confidences fill the upper ten.
    confidence = special.expit(np.abs(margin))
    accuracy, mean_confidence = calibration_curve(margin > 0, confidence, n_bins=20)
    filled = [b for b in figures.bins if b.n_pairs]
    assert [b.accuracy for b in filled] == pytest.approx(accuracy)
    assert [b.confidence for b in filled] == pytest.approx(mean_confidence)


@pytest.mark.parametrize("scale", [0.1, 1.0, 25.0])
def test_temperature_is_the_scale_of_overconfidence(scale):
    figures = calibration(simulated(20_000, scale))
    assert figures.temperature == pytest.approx(scale, rel=0.05)
    assert figures.log_loss_at_temperature <= figures.log_loss
    assert figures.ece_at_temperature < 0.015
    assert (figures.ece < 0.015) == (scale == 1.0)


@given(margin_lists)
def test_temperature_has_the_least_log_loss(margin):
    figures = calibration(margin)
    if figures.temperature is None:
        assert figures.temperature_note
        assert margin.min() >= 0 or margin.mean() <= 0
        return
    assert figures.temperature_note is None
    grid = figures.temperature * np.exp(np.linspace(-1, 1, 21))
    losses = [np.logaddexp(0, -margin / t).mean() for t in grid]
    assert figures.log_loss_at_temperature <= min(losses) + 1e-9


def test_temperature_is_scipys_minimum():
    margin = simulated(2000, 3.0)
    found = optimize.minimize_scalar(
        lambda t: np.logaddexp(0, -margin / t).mean(), bounds=(0.1, 30), method="bounded"
    )
    assert calibration(margin).temperature == pytest.approx(found.x, rel=1e-3)


@pytest.mark.parametrize(
    ("margin", "note"),
    [([1.0, 0.0, 3.0], "no pair is wrong"), ([1.0, -2.0], "not above 0"), ([0.0], "no pair is wrong")],
)
def test_no_temperature(margin, note):
    figures = calibration(np.array(margin))
    assert figures.temperature is None
    assert note in figures.temperature_note
    assert figures.log_loss_at_temperature is figures.ece_at_temperature is None


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_temperature_on_any_scale(scale):
    assert calibration(scale * np.array([2.0, 1.0, -1.0])).temperature == pytest.approx(
        scale * calibration(np.array([2.0, 1.0, -1.0])).temperature
    )


@given(margin_lists)
def test_bins_hold_every_pair_once_and_swapping_labels_mirrors_them(margin):
    bins, swapped = reliability(margin), reliability(-margin)
    assert sum(b.n_pairs for b in bins) == len(margin)
    for one, other in zip(bins, swapped, strict=True):
        assert (one.n_pairs, one.confidence) == (other.n_pairs, other.confidence)
        if one.n_pairs:
            assert one.low <= one.confidence + 1e-12
            assert one.confidence <= one.high + 1e-12
            assert one.accuracy == pytest.approx(1 - other.accuracy)


@given(margin_lists, st.randoms(use_true_random=False), st.integers(2, 3))
def test_order_and_copies_change_nothing(margin, random, times):
    order = list(range(len(margin)))
    random.shuffle(order)
    before, after = calibration(margin), calibration(np.repeat(margin[order], times))
    for figure in ("ece", "brier", "log_loss", "temperature", "ece_at_temperature"):
        value = getattr(before, figure)
        # Where a confidence lies on the edge of two bins, rounding of the temperature moves it.
        if value is not None and figure != "ece_at_temperature":
            assert getattr(after, figure) == pytest.approx(value, rel=1e-6, abs=1e-9)
    assert before.temperature_note == after.temperature_note


def test_nothing_scored():
    assert calibration(np.array([math.nan, math.inf])) is None
