"""Writes a report: `metrics.json`, `report.html`, `report.md` and `plots/`. Needs matplotlib and jinja2."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from polar_ft.errors import PolarError
from polar_ft.evaluation.pairs import PairTable
from polar_ft.evaluation.report.checks import make_checks, verdict
from polar_ft.evaluation.report.pages.html import html_report
from polar_ft.evaluation.report.plots.drawing import to_png
from polar_ft.evaluation.report.plots.plots import make_plots
from polar_ft.evaluation.report.report import HTML_FILE, MARKDOWN_FILE, METRICS_FILE, PLOTS_FOLDER, Report
from polar_ft.evaluation.report.sections import TextTable, make_sections
from polar_ft.evaluation.report.texts import count, percent, percent_interval, visible
from polar_ft.evaluation.report.worst import WorstPair

# What Markdown, or the HTML that Markdown may hold, would take for its own.
_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~$&])")


def write_report(
    report: Report,
    table: PairTable,
    out_dir: Path,
    *,
    worst: Sequence[WorstPair] = (),
) -> list[Path]:
    """Writes `metrics.json`, `report.html`, `report.md` and `plots/*.png`.

    Atomically: they are written to a temporary folder and renamed once all are complete, so that a full disk
    leaves what was there before.

    Args:
        report: The figures.
        table: The pairs that they are over, for the plots.
        out_dir: Where the files go; made where it is missing.
        worst: The pairs to show with their texts, see `polar_ft.evaluation.report.worst.worst_pairs`.

    Returns:
        The paths of the files, `metrics.json` first, without the plots.

    Raises:
        PolarError: They cannot be written.
    """
    plots = make_plots(report, table)
    contents = {
        METRICS_FILE: f"{report.model_dump_json(indent=2)}\n",
        HTML_FILE: html_report(report, plots, worst),
        MARKDOWN_FILE: markdown_report(report),
    }
    # A name of this process's own: two runs into one folder do not write into each other's files.
    unfinished = out_dir / f".unfinished.{os.getpid()}"
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            (unfinished / name).write_text(text, encoding="utf-8")
        (unfinished / PLOTS_FOLDER).mkdir(exist_ok=True)
        for plot in plots:
            (unfinished / PLOTS_FOLDER / f"{plot.name}.png").write_bytes(to_png(plot))
        for name in contents:
            (unfinished / name).replace(out_dir / name)
        # No plots of an earlier run are to remain next to the figures of this one.
        shutil.rmtree(out_dir / PLOTS_FOLDER, ignore_errors=True)
        (unfinished / PLOTS_FOLDER).replace(out_dir / PLOTS_FOLDER)
    except OSError as error:
        raise PolarError(
            f"{out_dir}: the results could not be written ({error.strerror or error}); make room or name "
            f"another folder with --out"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return [out_dir / name for name in contents]


def markdown_report(report: Report) -> str:
    """The report as Markdown tables for a model card, without plots and texts of pairs."""
    overall = report.metrics.overall
    lines = [
        "## Preference accuracy",
        "",
        f"**{percent(overall.accuracy)} %** of {count(overall.n_scored, 'scored pair')} right "
        f"(95 % interval {percent_interval(overall.interval)}), by `polar-ft eval`.",
        "",
        *(
            [f"The best rule without a model ({judged.rule}): {percent(judged.share)} %. {judged.text}", ""]
            if (judged := verdict(report))
            else []
        ),
        *(
            f"- **{check.status}**, {_escape(check.name)}: {_escape(check.text)}"
            for check in make_checks(report)
        ),
    ]
    for section in make_sections(report):
        lines += ["", f"### {_escape(section.title)}", "", _escape(section.explanation)]
        for table in section.tables:
            lines += ["", *_table(table)]
    return "\n".join([*lines, "", f"Plots are in `{PLOTS_FOLDER}/`.", ""])


def _table(table: TextTable) -> list[str]:
    alignment = ["---", *("---:" for _ in table.headers[1:])]
    if table.explained:
        alignment[-1] = "---"
    lines = [f"**{_escape(table.caption)}**", "", _line([*map(_escape, table.headers)]), _line(alignment)]
    for row in table.rows:
        cells = [_escape(text) for text in (row.name, *row.cells)]
        if row.strong:
            cells = [f"**{cell}**" if cell else "" for cell in cells]
        lines.append(_line(cells))
    return [*lines, *(text for note in table.notes for text in ("", _escape(note)))]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(text: str) -> str:
    r"""The text as text, on one line: nothing in it is markup.

    >>> _escape("a|b\n<script> *x*")
    'a\\|b \\<script\\> \\*x\\*'
    """
    return _SPECIAL.sub(r"\\\1", " ".join(visible(text).split()))
