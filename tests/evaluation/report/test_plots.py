from __future__ import annotations

import re
import warnings
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from polar_ft.evaluation.report.plots import drawing
from polar_ft.evaluation.report.plots.binning import margin_histogram, score_by_length
from polar_ft.evaluation.report.plots.drawing import can_draw, to_png, to_svg
from polar_ft.evaluation.report.plots.plots import make_plots
from polar_ft.evaluation.report.plots.subsets import SubsetMark, subset_plot

from .conftest import HOSTILE

floats = st.floats(-1e6, 1e6, allow_nan=False)
ALL_PAIRS = SubsetMark("all pairs", 9, 0.8, (0.7, 0.9), {})


@given(arrays(np.float64, st.integers(1, 80), elements=floats))
def test_histogram_counts_every_margin_on_its_side_of_zero(margins):
    histogram = margin_histogram(margins)
    right = histogram.edges[:-1] >= 0
    assert histogram.counts[right].sum() == np.count_nonzero(margins >= 0)
    assert histogram.counts.sum() == len(margins)
    assert len(histogram.counts) <= 83


def test_histogram_of_a_few_outliers_shows_the_bulk():
    margins = np.concatenate([np.linspace(-1, 1, 10_000), [1e6]])
    histogram = margin_histogram(margins)
    assert histogram.edges[-1] < 2
    assert histogram.counts.sum() == 10_001
    assert histogram.n_clipped == 1


@given(
    arrays(np.int64, st.integers(1, 80), elements=st.integers(0, 50)),
    st.integers(1, 12),
)
def test_score_bands_hold_every_candidate_once_and_equal_lengths_together(lengths, bins):
    band = score_by_length(lengths, lengths.astype(float), bins)
    assert band.n.sum() == len(lengths)
    assert (np.diff(band.length) > 0).all()
    assert (band.low <= band.middle).all()
    assert (band.middle <= band.high).all()


def test_a_plot_in_a_page_is_well_formed_and_its_own(make_run):
    report, table = make_run(["chat", "code"])
    plots = make_plots(report, table)
    ids = []
    for plot in plots:
        svg = to_svg(plot)
        ET.fromstring(svg.replace("<svg ", '<svg xmlns:xlink="x" ', 1))
        ids += re.findall(r' id="([^"]+)"', svg)
        for reference in re.findall(r'(?:href="#|url\(#)([^")]+)', svg):
            assert f'id="{reference}"' in svg
        # Every colour is the page's; black alone is what matplotlib has for "none given".
        assert set(re.findall(r"#[0-9a-f]{6}", svg)) <= {"#000000"}
        assert "<style" not in svg
        assert "DejaVu" not in svg
    assert len(ids) == len(set(ids))
    assert [plot.name for plot in plots] == [
        "subsets",
        "subsets_2",
        "margins",
        "reliability",
        "length_difference",
        "score_length",
    ]


def test_size_does_not_grow_with_the_data(make_run):
    few, many = (sum(len(to_svg(p)) for p in make_plots(*make_run(["a", "b"], n))) for n in (400, 40_000))
    assert many < 1.5 * few


def test_names_of_users_stay_text():
    svg = to_svg(subset_plot([SubsetMark(HOSTILE, 9, 0.5, (0.4, 0.6), {})], ALL_PAIRS))
    assert "<script" not in svg
    assert "\x1b" not in svg
    assert "\u202e" not in svg
    plain = to_svg(subset_plot([SubsetMark("$x^2$ 数学", 9, 0.5, (0.4, 0.6), {})], ALL_PAIRS))
    assert "$x^2$ 数学" in plain


def test_a_name_without_a_font_becomes_its_number_in_a_png(monkeypatch):
    monkeypatch.setattr(drawing, "_font_families", lambda: ["DejaVu Sans"])
    drawing._glyphs.cache_clear()
    seen = []
    plot = subset_plot(
        [SubsetMark("数学", 9, 0.9, (0.8, 1.0), {}), SubsetMark("Ελλ", 9, 0.5, (0.4, 0.6), {})], ALL_PAIRS
    )

    def draw(figure, theme, spell):
        seen.extend(map(spell, plot.labels))
        plot.draw(figure, theme, spell)

    try:
        assert not can_draw("数学")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            png = to_png(drawing.Plot(**{**plot.__dict__, "draw": draw}))
    finally:
        drawing._glyphs.cache_clear()
    assert png.startswith(b"\x89PNG")
    assert seen == ["all pairs", "#1", "Ελλ"]


def test_of_many_subsets_the_largest_are_drawn():
    marks = [SubsetMark(f"s{i}", i, 0.5, (0.4, 0.6), {}) for i in range(1, 61)]
    plot = subset_plot(marks, ALL_PAIRS)
    assert set(plot.labels[1:]) == {f"s{i}" for i in range(21, 61)}
    assert "20 smaller subsets are in the table only" in plot.explanation


@pytest.mark.parametrize("n", [1, 2, 7])
def test_the_smallest_data_has_its_plots(make_run, n):
    report, table = make_run(["chat"], n)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for plot in make_plots(report, table):
            assert to_png(plot).startswith(b"\x89PNG")
