"""The chart of subsets: the model's accuracy with its interval, next to rules that need no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from polar_ft.evaluation.figures import Figures
from polar_ft.evaluation.report.plots.axes import (
    DASHED,
    WIDTH,
    add_grid,
    add_legend,
    error_lengths,
    new_axes,
)
from polar_ft.evaluation.report.plots.drawing import Plot, Spell, Theme
from polar_ft.evaluation.report.sections import baseline_of
from polar_ft.evaluation.report.texts import one_line
from polar_ft.evaluation.statistics.accuracy import Interval, PairMetrics

_MAX_SUBSETS = 40
_NAME_LIMIT = 18

# The rules that are drawn next to the model, where they are known.
_BASELINE_MARKERS = {"longer wins": "D", "most like the reference wins": "s"}


@dataclass(frozen=True)
class SubsetMark:
    """One row of the subset chart.

    Attributes:
        name: The subset's name.
        n: Scored pairs.
        accuracy: Of the model.
        ci95: Its interval.
        baselines: Accuracy of rules without a model, by their name.
    """

    name: str
    n: int
    accuracy: float
    ci95: Interval
    baselines: dict[str, float]


def field_plot(figures: Figures, field_name: str, name: str) -> Plot:
    """The chart of one field; see `subset_plot`.

    Args:
        figures: Of a run with a scored pair.
        field_name: Whose values the rows are.
        name: Of the plot's file.
    """
    rules = {
        "longer wins": figures.baselines.longer_wins,
        "most like the reference wins": figures.baselines.most_like_reference,
    }

    def mark(title: str, metrics: PairMetrics, subset: str | None) -> SubsetMark | None:
        if metrics.accuracy is None or metrics.interval is None:
            return None
        shares = {
            rule_name: baseline_of(rule, field_name if subset is not None else None, subset)
            for rule_name, rule in rules.items()
        }
        known = {rule_name: share for rule_name, share in shares.items() if share is not None}
        return SubsetMark(title, metrics.n_scored, metrics.accuracy, metrics.interval, known)

    overall = mark("all pairs", figures.overall, None)
    assert overall is not None, "there are no plots without a scored pair"
    marks = [mark(subset, metrics, subset) for subset, metrics in figures.subsets[field_name].subsets.items()]
    title = f"Accuracy by {one_line(field_name, _NAME_LIMIT)}"
    return subset_plot([known for known in marks if known is not None], overall, title=title, name=name)


def subset_plot(
    subsets: Sequence[SubsetMark],
    overall: SubsetMark,
    *,
    title: str = "Accuracy by subset",
    name: str = "subsets",
) -> Plot:
    """Accuracy of every subset with its interval, next to rules that need no model.

    Args:
        subsets: In any order; beyond 40 the ones with the most pairs are drawn.
        overall: All pairs, drawn on top.
        title: Of the plot.
        name: Of the plot's file.
    """
    shown = sorted(subsets, key=lambda mark: -mark.n)[:_MAX_SUBSETS]
    rows = [overall, *sorted(shown, key=lambda mark: -mark.accuracy)]
    labels = tuple(one_line(mark.name, _NAME_LIMIT) for mark in rows)
    left_out = len(subsets) - len(shown)

    def draw(figure: Figure, theme: Theme, spell: Spell) -> None:
        axes = new_axes(figure, theme)
        y = np.arange(len(rows))
        accuracy = np.array([mark.accuracy for mark in rows])
        bounds = np.array([mark.ci95 for mark in rows])
        axes.axvline(0.5, color=theme.faint, linewidth=1, linestyle=DASHED, zorder=1)
        for (rule, marker), colour in zip(_BASELINE_MARKERS.items(), (theme.second, theme.ink), strict=True):
            known = [(i, mark.baselines[rule]) for i, mark in enumerate(rows) if rule in mark.baselines]
            if known:
                axes.scatter(
                    [share for _, share in known],
                    [i for i, _ in known],
                    marker=marker,
                    s=30,
                    facecolors="none",
                    edgecolors=colour,
                    label=rule,
                    # On top: a hollow mark hides no dot, and a dot would hide it.
                    zorder=5,
                )
        axes.errorbar(
            accuracy,
            y,
            xerr=error_lengths(accuracy, [mark.ci95 for mark in rows]),
            fmt="none",
            ecolor=theme.first,
            elinewidth=2,
            zorder=3,
        )
        axes.scatter(accuracy, y, s=42, color=theme.first, label="this model", zorder=4)
        axes.axhline(0.5, color=theme.faint, linewidth=0.8)
        axes.set_yticks(y, [spell(label) for label in labels])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.get_yticklabels()[0].set_fontweight("bold")
        low = min(0.4, float(bounds.min()), *(s for mark in rows for s in mark.baselines.values()))
        axes.set_xlim(max(0.0, low - 0.02), 1.01)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel("accuracy", color=theme.ink)
        add_grid(axes, theme, "x")
        add_legend(figure, axes, theme)

    worst, best = (pick(shown or [overall], key=lambda mark: mark.accuracy) for pick in (min, max))
    return Plot(
        name=name,
        title=title,
        explanation=(
            "Filled dots are the model, bars their 95 % intervals; a subset whose bar reaches a hollow mark "
            "or the dashed line (chance, 50 %) is not shown to be better than that rule."
            + (f" {left_out} smaller subsets are in the table only." if left_out else "")
        ),
        alt=(
            f"Accuracy of {len(shown)} subsets with 95 % intervals. Lowest: {one_line(worst.name)}, "
            f"{worst.accuracy:.1%}; highest: {one_line(best.name)}, {best.accuracy:.1%}; all pairs: "
            f"{overall.accuracy:.1%}."
        ),
        size=(WIDTH, 1.6 + 0.27 * len(rows)),
        draw=draw,
        labels=labels,
    )
