"""What a run shows on the screen: a table and the sentences to read it with."""

from __future__ import annotations

from rich import box
from rich.table import Table

from polar_ft.evaluation.metrics import Interval, MacroMetrics, PairMetrics
from polar_ft.evaluation.report import SCORES_FILE, Report, ShuffledReference

TABLE_WIDTH = 100

_HEADERS = (
    "pairs",
    "acc.\n%",
    "95 %\ninterval",
    "ties",
    "not\nfinite",
    "mean\nmargin",
    "log-\nloss",
    "longer/\nshorter",
)


def metrics_table(report: Report) -> Table:
    """A table of at most `TABLE_WIDTH` columns: one row a subset, then their mean, then all pairs."""
    metrics, shuffled = report.metrics, report.shuffled_reference
    longer, shorter = report.baselines.longer_wins, report.baselines.shorter_wins
    # One blank from the padding and one from the box between columns: rich would take three.
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("", overflow="fold", min_width=len("mean of subsets"))
    for header in _HEADERS if shuffled is None else (*_HEADERS, "shuffled\nrefs, %"):
        table.add_column(header, justify="right", no_wrap=True)

    for name, figures in metrics.subsets.items():
        table.add_row(
            name,
            *_cells(figures, longer.subsets[name], shorter.subsets[name]),
            *([percent(shuffled.metrics.subsets[name].accuracy)] if shuffled else []),
        )
    table.add_section()
    if metrics.macro is not None:
        table.add_row(
            "mean of subsets",
            *_cells(metrics.macro, longer.macro, shorter.macro),
            *([percent(shuffled.metrics.macro.accuracy)] if shuffled and shuffled.metrics.macro else []),
        )
    table.add_row(
        "all pairs",
        *_cells(metrics.overall, longer.overall, shorter.overall),
        *([percent(shuffled.metrics.overall.accuracy)] if shuffled else []),
        style="bold",
    )
    return table


def notes(report: Report) -> list[str]:
    """What the table has to be read with, a sentence or two each."""
    overall, cut, run = report.metrics.overall, report.truncation, report.run
    longer, shorter = report.baselines.longer_wins.overall, report.baselines.shorter_wins.overall
    lines = [
        (
            f"Accuracy is correct / scored pairs = {overall.n_correct} / {overall.n_scored}: a tie (exactly "
            f"equal scores) is not correct; with ties as half it is {percent(overall.accuracy_ties_half)} %."
        ),
        (
            f"Without a model, on the same pairs: the longer candidate wins {percent(longer)} %, the shorter "
            f"one {percent(shorter)} % (characters of the whole texts; equal lengths as half)."
        ),
    ]
    if overall.n_nonfinite:
        lines.append(
            f"WARNING: {overall.n_nonfinite} of {overall.n_pairs} pairs have a score that is NaN or infinite "
            f"and are in no other figure. In {SCORES_FILE} they are the rows with a quoted score."
        )
    if run.n_ties_in_data:
        lines.append(f"{run.n_ties_in_data} pairs that the data itself ranks the same were left out.")
    if cut.n_pairs:
        lines.append(
            f"Cut to max_length {run.max_length} and max_response_length {run.max_response_length}: "
            f"{cut.n_pairs} of {overall.n_pairs} pairs (prompt {cut.prompt}, reference {cut.reference}, "
            f"chosen {cut.chosen}, rejected {cut.rejected})."
        )
    if report.shuffled_reference is not None:
        lines.append(_shuffled_note(report.shuffled_reference, overall))
    return lines


def percent(share: float | None) -> str:
    """A share in percent with one decimal, "–" for none.

    >>> percent(0.7512), percent(None)
    ('75.1', '–')
    """
    return "–" if share is None else f"{100 * share:.1f}"


def percent_interval(interval: Interval | None) -> str:
    """An interval of shares in percent.

    >>> percent_interval((0.7, 0.8126))
    '70.0–81.3'
    """
    return "–" if interval is None else "–".join(percent(bound) for bound in interval)


def _cells(
    figures: PairMetrics | MacroMetrics, longer_wins: float | None, shorter_wins: float | None
) -> list[str]:
    """One cell for each of `_HEADERS`."""
    counts = ["", "", ""]
    if isinstance(figures, PairMetrics):
        counts = [str(figures.n_pairs), str(figures.n_ties), str(figures.n_nonfinite)]
    return [
        counts[0],
        percent(figures.accuracy),
        percent_interval(figures.accuracy_ci95),
        *counts[1:],
        _number(figures.mean_margin),
        _number(figures.log_loss),
        f"{percent(longer_wins)}/{percent(shorter_wins)}" if longer_wins is not None else "–",
    ]


def _shuffled_note(shuffled: ShuffledReference, overall: PairMetrics) -> str:
    figures = shuffled.metrics.overall
    note = (
        f"References shuffled between rows: accuracy {percent(figures.accuracy)} % "
        f"({percent_interval(figures.accuracy_ci95)}), against {percent(overall.accuracy)} % with their own; "
        f"ties {figures.n_ties}, not finite {figures.n_nonfinite}."
    )
    if shuffled.n_same_reference:
        note += f" {shuffled.n_same_reference} pairs kept the same reference text, for want of another."
    return note


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.2g}" if abs(value) >= 1e5 else f"{value:.0f}"
