"""What a run shows on the screen: tables and the sentences to read them with."""

from __future__ import annotations

from textwrap import fill

from rich import box
from rich.table import Table
from rich.text import Text

from polar_ft.evaluation.figures import OtherReference
from polar_ft.evaluation.report.checks import make_checks
from polar_ft.evaluation.report.ranked import benchmark_sections, ranking_section
from polar_ft.evaluation.report.report import Report
from polar_ft.evaluation.report.sections import baseline_mean, baseline_of
from polar_ft.evaluation.report.texts import (
    TextTable,
    largest,
    number,
    percent,
    percent_interval,
    visible,
)
from polar_ft.evaluation.statistics.accuracy import MacroMetrics, PairMetrics
from polar_ft.evaluation.statistics.baselines import Baseline

TABLE_WIDTH = 100
# Of more subsets the largest are shown; the report and metrics.json have the others.
MAX_SUBSETS = 100


def screen_tables(report: Report) -> list[Table]:
    """The accuracy by every field, ranked rows and summaries of benchmarks; each fits `TABLE_WIDTH`."""
    tables = [metrics_table(report, field) for field in list(report.metrics.subsets)[1:]]
    return [metrics_table(report), *tables, *map(_text_table, _ranked_tables(report))]


def _ranked_tables(report: Report) -> list[TextTable]:
    """Best of N, and of each benchmark the figures that it publishes; the report has their parts too."""
    figures = report.metrics
    sections = [] if figures.ranking is None else [ranking_section(figures.ranking)]
    if figures.benchmarks is not None:
        sections += benchmark_sections(figures.benchmarks)
    return [section.tables[0] for section in sections]


def metrics_table(report: Report, field: str | None = None) -> Table:
    """A table of at most `TABLE_WIDTH` columns: one row a subset, then their mean, then all pairs.

    Args:
        report: The figures.
        field: Whose values the rows are; None takes the first field, and all pairs alone where there is none.
    """
    figures = report.metrics
    if field is None:
        field = next(iter(figures.subsets), None)
    breakdown = figures.subsets.get(field) if field is not None else None
    columns = _columns(report)
    # Between columns the box has one blank; a second one where there is room for it.
    names = "" if field is None or field == "subset" else field
    table = _table(padding=1 if len(columns) <= 8 else 0, names=names)
    for header in columns:
        table.add_column(header, justify="right", no_wrap=True)
    if breakdown is not None:
        shown, left_out = largest(breakdown.subsets, MAX_SUBSETS)
        for name, metrics in shown.items():
            table.add_row(_plain(name), *_cells(report, columns, metrics, field, name))
        for note in left_out:
            table.add_row(note)
        table.add_section()
        table.add_row("mean of subsets", *_cells(report, columns, breakdown.macro, field, None))
    table.add_row("all pairs", *_cells(report, columns, figures.overall, None, None), style="bold")
    return table


def notes(report: Report) -> list[str]:
    """What the tables have to be read with, a sentence or two each; the first ones define the figures."""
    overall, baselines = report.metrics.overall, report.metrics.baselines
    lines = [
        f"Accuracy is correct / scored pairs = {overall.n_correct:,} / {overall.n_scored:,}: a tie (exactly "
        f"equal scores) is not correct; with ties as half it is {percent(overall.accuracy_ties_half)} %."
    ]
    rules = [
        f"{said} {percent(rule.overall)} %"
        for said, rule in (
            ("the longer candidate wins", baselines.longer_wins),
            ("the shorter one", baselines.shorter_wins),
            ("the one most like the reference (ROUGE-L)", baselines.most_like_reference),
        )
        if rule is not None
    ]
    if rules:
        lines.append(
            f"Without a model, on the same pairs: {', '.join(rules)} (equal as half), chance "
            f"{percent(baselines.chance)} %."
        )
    lines += [f"{table.caption}: {note}" for table in _ranked_tables(report)[1:] for note in table.notes]
    for check in make_checks(report):
        loud = check.status in ("failed", "warning")
        status = check.status.upper() if loud else check.status
        lines.append(f"{status}: {check.name}: {visible(check.text)}")
    return lines


def _columns(report: Report) -> list[str]:
    figures, use = report.metrics, report.metrics.reference_use
    wanted = {
        "pairs": True,
        "acc.\n%": True,
        "95 %\ninterval": True,
        "ties": True,
        "not\nfinite": figures.overall.n_nonfinite > 0,
        "mean\nmargin": True,
        "log-\nloss": True,
        "longer/\nshorter": figures.baselines.longer_wins is not None,
        "like\nref.": figures.baselines.most_like_reference is not None,
        "shuf.\nrefs": use is not None and use.shuffled is not None,
        "no\nrefs": use is not None and use.empty is not None,
    }
    return [header for header, shown in wanted.items() if shown]


def _cells(
    report: Report,
    columns: list[str],
    metrics: PairMetrics | MacroMetrics,
    field: str | None,
    name: str | None,
) -> list[str]:
    """One cell for each of the columns; without a name the row is the mean of subsets or all pairs."""
    baselines, use = report.metrics.baselines, report.metrics.reference_use
    is_mean = isinstance(metrics, MacroMetrics)

    def rule(baseline: Baseline | None) -> str:
        if baseline is None:
            return "–"
        if is_mean and field is not None:
            return percent(baseline_mean(baseline, field))
        return percent(baseline_of(baseline, field, name))

    def other(reference: OtherReference | None) -> str:
        if reference is None or is_mean:
            return ""
        if field is None or name is None:
            return percent(reference.overall.accuracy)
        return percent(reference.subsets.get(field, {}).get(name))

    longer, shorter = rule(baselines.longer_wins), rule(baselines.shorter_wins)
    cells = {
        "pairs": str(metrics.n_pairs) if isinstance(metrics, PairMetrics) else "",
        "acc.\n%": percent(metrics.accuracy),
        "95 %\ninterval": percent_interval(metrics.interval),
        "ties": str(metrics.n_ties) if isinstance(metrics, PairMetrics) else "",
        "not\nfinite": str(metrics.n_nonfinite) if isinstance(metrics, PairMetrics) else "",
        "mean\nmargin": number(metrics.mean_margin),
        "log-\nloss": number(metrics.log_loss),
        "longer/\nshorter": longer if longer == "–" else f"{longer}/{shorter}",
        "like\nref.": rule(baselines.most_like_reference),
        "shuf.\nrefs": other(use.shuffled if use else None),
        "no\nrefs": other(use.empty if use else None),
    }
    return [cells[column] for column in columns]


def _text_table(shown: TextTable) -> Table:
    """A table of the report for the screen; its caption stands over the names."""
    table = _table(padding=1, names=shown.caption)
    for header in shown.headers[1:]:
        table.add_column(fill(header, 10), justify="right", no_wrap=True)
    for row in shown.rows:
        if row.strong:
            table.add_section()
        table.add_row(_plain(row.name), *row.cells, style="bold" if row.strong else None)
    return table


def _table(*, padding: int, names: str) -> Table:
    """A table whose first column, of names, takes what the others leave; long names wrap."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, padding, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(_plain(names), overflow="fold", min_width=9)
    return table


def _plain(name: str) -> Text:
    """A name of users as text: rich would read "[bold]" as markup."""
    return Text(visible(name))
