"""The plots of a report: what each one shows, how it is read, and how it is drawn."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from polar_ft.evaluation.pairs import Floats, Ints, PairTable
from polar_ft.evaluation.report.plots.axes import (
    DASHED,
    HEIGHT,
    WIDTH,
    add_grid,
    add_legend,
    error_lengths,
    new_axes,
    style,
    thousands,
)
from polar_ft.evaluation.report.plots.binning import ScoreBand, margin_histogram, score_by_length
from polar_ft.evaluation.report.plots.drawing import Plot, Spell, Theme
from polar_ft.evaluation.report.plots.subsets import field_plot
from polar_ft.evaluation.report.report import Report
from polar_ft.evaluation.report.texts import count
from polar_ft.evaluation.statistics.calibration import Calibration
from polar_ft.evaluation.statistics.length import LengthBias


def make_plots(report: Report, table: PairTable) -> list[Plot]:
    """The plots that the run has something for.

    Args:
        report: The figures.
        table: The pairs that they are over.
    """
    figures = report.metrics
    if figures.overall.n_scored == 0:
        return []
    plots = [
        field_plot(figures, field_name, "subsets" if i == 1 else f"subsets_{i}")
        for i, field_name in enumerate(figures.subsets, 1)
    ]
    plots.append(margin_plot(table.margins[table.scored]))
    if figures.calibration is not None:
        plots.append(reliability_plot(figures.calibration))
    if figures.length is not None:
        plots.append(length_difference_plot(figures.length))
        chosen, rejected = _lengths(table, figures.length.unit)
        scored = table.scored
        plots.append(
            score_length_plot(
                (chosen[scored], table.chosen_score[scored]),
                (rejected[scored], table.rejected_score[scored]),
                figures.length.unit,
            )
        )
    return plots


def _lengths(table: PairTable, unit: str) -> tuple[Ints, Ints]:
    columns = (
        (table.chosen_chars, table.rejected_chars)
        if unit == "characters"
        else (table.chosen_tokens, table.rejected_tokens)
    )
    known = [column for column in columns if column is not None]
    assert len(known) == 2, "figures.length is of one of the table's columns"
    return known[0], known[1]


def margin_plot(margins: Floats) -> Plot:
    """Histogram of margins.

    Args:
        margins: Finite margins, `[pairs]`, at least one.
    """
    histogram = margin_histogram(margins)
    right, ties = float(np.mean(margins > 0)), int(np.count_nonzero(margins == 0))
    median = float(np.median(margins))

    def draw(figure: Figure, theme: Theme, spell: Spell) -> None:
        axes = new_axes(figure, theme)
        wrong = histogram.edges[1:] <= 0
        width = float(histogram.edges[1] - histogram.edges[0])
        for rows, colour, hatch, label in (
            (wrong, theme.second, "///", "rejected scored higher"),
            (~wrong, theme.first, None, "chosen scored higher"),
        ):
            if not rows.any():
                continue
            axes.bar(
                histogram.edges[:-1][rows],
                histogram.counts[rows],
                width=width,
                align="edge",
                color=colour,
                edgecolor=theme.paper,
                linewidth=0.5,
                hatch=hatch,
                label=label,
            )
        axes.axvline(0, color=theme.ink, linewidth=1)
        axes.axvline(median, color=theme.ink, linewidth=1, linestyle=DASHED, label="median")
        axes.set_xlabel("margin: chosen − rejected", color=theme.ink)
        axes.set_ylabel("pairs", color=theme.ink)
        axes.yaxis.set_major_formatter(thousands())
        add_grid(axes, theme, "y")
        add_legend(figure, axes, theme)

    notes = []
    if ties:
        notes.append(f" {count(ties, 'tie')} (margin exactly 0) stand in the first bar right of 0.")
    if histogram.n_clipped:
        notes.append(f" {count(histogram.n_clipped, 'pair')} beyond the ends stand in the end bars.")
    return Plot(
        name="margins",
        title="Margins",
        explanation=(
            "What lies left of 0 is wrong. A mass close to 0 means that many pairs are decided by little."
            + "".join(notes)
        ),
        alt=(
            f"Histogram of the margins of {count(len(margins), 'pair')}: {right:.1%} are above 0, the median "
            f"is {median:.3g}."
        ),
        size=(WIDTH, HEIGHT),
        draw=draw,
    )


def reliability_plot(figures: Calibration) -> Plot:
    """How often the model is right against how sure it is."""
    bins = [
        (entry.n_pairs, entry.confidence, entry.accuracy, entry.accuracy_ci95)
        for entry in figures.bins
        if entry.confidence is not None and entry.accuracy is not None and entry.accuracy_ci95 is not None
    ]
    counts, confidence, accuracy = (np.array([entry[i] for entry in bins], dtype=float) for i in range(3))
    errors = error_lengths(accuracy, [entry[3] for entry in bins])

    def draw(figure: Figure, theme: Theme, spell: Spell) -> None:
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        style(axes, theme)
        style(below, theme)
        axes.plot([0.5, 1], [0.5, 1], color=theme.faint, linestyle=DASHED, label="perfectly calibrated")
        axes.errorbar(confidence, accuracy, yerr=errors, fmt="none", ecolor=theme.first, elinewidth=1.5)
        axes.plot(confidence, accuracy, marker="o", markersize=5, color=theme.first, label="this model")
        axes.set_ylim(max(-0.02, min(0.45, float((accuracy - errors[0]).min()) - 0.03)), 1.02)
        axes.set_xlim(0.49, 1.01)
        axes.set_ylabel("accuracy", color=theme.ink)
        for axis in (axes.yaxis, below.xaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0))
        edges = np.array([(entry.low, entry.high) for entry in figures.bins if entry.n_pairs])
        below.bar(
            edges[:, 0],
            counts,
            width=edges[:, 1] - edges[:, 0],
            align="edge",
            color=theme.first,
            edgecolor=theme.paper,
            linewidth=0.5,
        )
        below.set_ylabel("pairs", color=theme.ink)
        below.yaxis.set_major_formatter(thousands())
        below.set_xlabel("confidence: σ(|margin|)", color=theme.ink)
        add_grid(axes, theme, "both")
        add_legend(figure, axes, theme)

    return Plot(
        name="reliability",
        title="Reliability",
        explanation=(
            "Each dot is the pairs that the model is about equally sure of. Below the diagonal it is surer "
            "than it is right. The bars underneath say how many pairs a dot stands for."
        ),
        alt=(
            f"Accuracy against confidence in {len(bins)} bins; expected calibration error {figures.ece:.3f}. "
            f"In the bin of highest confidence, {confidence[-1]:.1%}, the accuracy is {accuracy[-1]:.1%}."
        ),
        size=(WIDTH, HEIGHT + 0.6),
        draw=draw,
    )


def length_difference_plot(figures: LengthBias) -> Plot:
    """Accuracy against by how much the chosen candidate is longer."""
    groups = [
        (
            _range(group.low, group.high),
            group.low + group.high,
            group.n_pairs,
            group.accuracy,
            group.accuracy_ci95,
        )
        for group in figures.by_difference
        if group.accuracy is not None
        and group.accuracy_ci95 is not None
        and group.low is not None
        and group.high is not None
    ]
    accuracy = np.array([group[3] for group in groups])
    errors = error_lengths(accuracy, [group[4] for group in groups])

    def draw(figure: Figure, theme: Theme, spell: Spell) -> None:
        axes = new_axes(figure, theme)
        x = np.arange(len(groups))
        axes.axhline(0.5, color=theme.faint, linewidth=1, linestyle=DASHED)
        for longer, marker, colour, label in (
            (False, "v", theme.second, "chosen is shorter, or as long"),
            (True, "^", theme.first, "chosen is longer"),
        ):
            rows = [i for i, group in enumerate(groups) if (group[1] > 0) == longer]
            if rows:
                axes.errorbar(
                    x[rows],
                    accuracy[rows],
                    yerr=errors[:, rows],
                    fmt=marker,
                    markersize=7,
                    color=colour,
                    elinewidth=2,
                    label=label,
                )
        axes.set_xticks(x, [group[0] for group in groups], rotation=90)
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.set_ylim(max(-0.02, min(0.4, float((accuracy - errors[0]).min()) - 0.03)), 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel(f"chosen − rejected, {figures.unit}", color=theme.ink)
        axes.set_ylabel("accuracy", color=theme.ink)
        add_grid(axes, theme, "y")
        add_legend(figure, axes, theme)

    said = "; ".join(f"{group[0]}: {group[3]:.1%}" for group in groups)
    return Plot(
        name="length_difference",
        title="Accuracy against length difference",
        explanation=(
            "Groups of about equally many pairs. A model without a length bias is as high on the left as on "
            "the right; one that likes length climbs to the right. Bars are 95 % intervals."
        ),
        alt=f"Accuracy by length of chosen − rejected in {figures.unit}: {said}.",
        size=(WIDTH, HEIGHT + 0.8),
        draw=draw,
    )


def score_length_plot(chosen: tuple[Ints, Floats], rejected: tuple[Ints, Floats], unit: str) -> Plot:
    """Scores of chosen and rejected candidates against their length.

    Args:
        chosen: Lengths and finite scores of the chosen candidates, `[pairs]` each.
        rejected: The same of the rejected ones.
        unit: "characters" or "tokens".
    """
    bands = {"chosen": score_by_length(*chosen), "rejected": score_by_length(*rejected)}

    def draw(figure: Figure, theme: Theme, spell: Spell) -> None:
        axes = new_axes(figure, theme)
        styles = {"chosen": ("o", "-", theme.first), "rejected": ("s", "--", theme.second)}
        for name, band in bands.items():
            marker, line, colour = styles[name]
            axes.fill_between(band.length, band.low, band.high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(band.length, band.middle, line, marker=marker, markersize=5, color=colour, label=name)
        longest = max(float(band.length.max()) for band in bands.values())
        shortest = min(float(band.length.min()) for band in bands.values())
        if longest > 20 * max(shortest, 1.0):
            axes.set_xscale("symlog", linthresh=10.0)
        axes.xaxis.set_major_formatter(thousands())
        axes.set_xlabel(f"length in {unit}", color=theme.ink)
        axes.set_ylabel("score", color=theme.ink)
        add_grid(axes, theme, "both")
        add_legend(figure, axes, theme)

    return Plot(
        name="score_length",
        title="Score against length",
        explanation=(
            "Lines are medians in bins of equally many candidates, shades hold the middle 80 %. Lines that "
            "rise together show scores that grow with length, whatever the answer is worth."
        ),
        alt="Median scores from the shortest to the longest candidates. "
        + " ".join(f"{name.capitalize()}: {_ends(band)}." for name, band in bands.items()),
        size=(WIDTH, HEIGHT),
        draw=draw,
    )


def _range(low: int, high: int) -> str:
    """The differences of a group.

    >>> _range(-450, -201), _range(0, 0)
    ('−450 to −201', '0')
    """
    first, last = (f"{bound:+,}".replace("-", "−") if bound else "0" for bound in (low, high))
    return first if first == last else f"{first} to {last}"


def _ends(band: ScoreBand) -> str:
    first, last = (f"{band.middle[i]:.3g} at {band.length[i]:,.0f}" for i in (0, -1))
    return f"{first}, {last}"
