"""What the plots have in common: sizes, axes, grids, legends, tick labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from polar_ft.evaluation.pairs import Floats
from polar_ft.evaluation.report.plots.drawing import Theme
from polar_ft.evaluation.statistics.accuracy import Interval

# Inches. Small, so that the texts of a plot that fills a phone's width can still be read.
WIDTH, HEIGHT = 3.6, 3.2
DASHED = (0, (4, 3))


def new_axes(figure: Figure, theme: Theme) -> Axes:
    """The one pair of axes of a figure."""
    axes = figure.add_subplot()
    style(axes, theme)
    return axes


def style(axes: Axes, theme: Theme) -> None:
    """Gives axes the theme's colours."""
    axes.set_facecolor("none")
    for spine in axes.spines.values():
        spine.set_color(theme.ink)
    axes.tick_params(colors=theme.ink, which="both")


def add_grid(axes: Axes, theme: Theme, axis: str) -> None:
    """Faint lines behind the marks; `axis` is "x", "y" or "both"."""
    axes.grid(axis=axis, color=theme.faint, alpha=0.35, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def add_legend(figure: Figure, axes: Axes, theme: Theme) -> None:
    """Above the plot, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    legend = figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=len(labels) if sum(map(len, labels)) < 25 else 1,
        columnspacing=1.2,
        handletextpad=0.4,
        labelspacing=0.2,
    )
    for text in legend.get_texts():
        text.set_color(theme.ink)


def thousands() -> FuncFormatter:
    """Tick labels with a comma for thousands: "12,000"."""
    return FuncFormatter(lambda value, _: f"{value:,.0f}" if value == round(value) else f"{value:g}")


def error_lengths(values: Floats, intervals: Sequence[Interval]) -> Floats:
    """Lengths of error bars below and above, `[2, values]`; none where the value lies outside its interval.

    >>> error_lengths(np.array([0.5, 0.5]), [(0.25, 0.625), (0.75, 1.0)]).tolist()
    [[0.25, 0.0], [0.125, 0.5]]
    """
    low, high = np.array(intervals, dtype=np.float64).reshape(-1, 2).T
    return np.maximum(np.stack([values - low, high - values]), 0.0)
