"""From saved scores to the report: the same for a run that has just ended and for scores of another tool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from polar_ft.data.records import Example
from polar_ft.evaluation.figures import compute_figures
from polar_ft.evaluation.gates import GateResult
from polar_ft.evaluation.pairs import PairTable
from polar_ft.evaluation.report.checks import verdict
from polar_ft.evaluation.report.report import (
    HTML_FILE,
    MARKDOWN_FILE,
    METRICS_FILE,
    SCORES_FILE,
    Report,
    RunInfo,
    Truncation,
)
from polar_ft.evaluation.report.table import TABLE_WIDTH, notes, screen_tables
from polar_ft.evaluation.report.texts import percent, percent_interval
from polar_ft.evaluation.report.worst import PairTexts, WorstPair, pair_texts, worst_pairs
from polar_ft.evaluation.scores_file import SavedScores, read_scores
from polar_ft.template import PolarTemplate


def report_scores(
    scores: Path,
    out_dir: Path,
    subset_by: Sequence[str],
    run: RunInfo,
    *,
    gates: Sequence[GateResult] = (),
    examples: Sequence[Example] | None = None,
    template: PolarTemplate | None = None,
    before_writing: Callable[[], object] = lambda: None,
) -> Report:
    """Reads scores, computes every figure, writes the report and shows the table.

    Args:
        scores: A run's folder, or a file of scores.
        out_dir: Where the report goes.
        subset_by: Fields to group by, in addition to "subset".
        run: What is known about the run; what the scores themselves say is filled in.
        gates: What the run checked of itself.
        examples: The rows that were scored, for the texts of the worst pairs; with
        template: the template of their model.
        before_writing: Called when the scores have been read.

    Raises:
        PolarError: The scores cannot be used, or the report cannot be written.
    """
    saved = read_scores(scores, subset_by)
    table = saved.table
    report = Report(
        metrics=compute_figures(table, saved.rankings),
        gates=list(gates),
        warnings=list(saved.warnings),
        truncation=_truncation(saved),
        run=run.model_copy(
            update={
                "n_rows": run.n_rows or len(table),
                "n_same_reference": saved.n_same_reference,
                "engine": run.engine or saved.form,
            }
        ),
    )
    # Imported here: it needs matplotlib and jinja2, which a table on the screen does not.
    from polar_ft.evaluation.report.writing import write_report

    before_writing()
    write_report(report, table, out_dir, worst=_worst(table, examples, template))
    show_report(report, out_dir, "wrote")
    return report


def _truncation(saved: SavedScores) -> Truncation | None:
    if saved.cut is None or saved.table.cut is None:
        return None
    return Truncation(n_pairs=int(saved.table.cut.sum()), **saved.cut)


def _worst(
    table: PairTable, examples: Sequence[Example] | None, template: PolarTemplate | None
) -> list[WorstPair]:
    if examples is None or template is None:
        return worst_pairs(table)
    # The rows of the table are the pairs of the examples, in their order.
    pairs = [(example, pair) for example in examples for pair in example.pairs]

    def texts(row: int) -> PairTexts:
        example, (chosen, rejected) = pairs[row]
        return pair_texts(template, example, chosen, rejected)

    return worst_pairs(table, texts)


def show_report(report: Report, folder: Path, done: str) -> None:
    """Prints the tables of a report, the sentences to read them with, and what was done with each file."""
    console = Console()
    # A pipe has no width of its own, and rich would take 80 columns.
    console.width = min(console.width, TABLE_WIDTH) if console.is_terminal else TABLE_WIDTH
    overall = report.metrics.overall
    name = report.run.model or ", ".join(file.path for file in report.run.data)
    console.print(f"\n{name}", style="bold", highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"accuracy {percent(overall.accuracy)} %, 95 % interval {percent_interval(overall.interval)}, "
        f"on {overall.n_pairs} held-out pairs",
        style="bold",
        highlight=False,
    )
    if (judged := verdict(report)) is not None:
        console.print(
            f"best rule without a model ({judged.rule}): {percent(judged.share)} %. {judged.text}",
            style="bold red" if judged.status == "failed" else None,
            highlight=False,
        )
    console.print()
    for table in screen_tables(report):
        console.print(table)
        console.print()
    for note in notes(report):
        console.print(note, highlight=False, markup=False)
    for name in (SCORES_FILE, METRICS_FILE, HTML_FILE, MARKDOWN_FILE):
        if (folder / name).is_file():
            console.print(f"{done} {folder / name}", highlight=False, markup=False, soft_wrap=True)
