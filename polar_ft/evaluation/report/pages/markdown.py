"""`report.md`: the figures as Markdown tables, to stand in a model card."""

from __future__ import annotations

import re
from collections.abc import Sequence

from polar_ft.evaluation.report.checks import make_checks
from polar_ft.evaluation.report.numbers import count, percent, percent_interval
from polar_ft.evaluation.report.report import PLOTS_FOLDER, Report
from polar_ft.evaluation.report.sections import TextTable, make_sections
from polar_ft.evaluation.report.visible import visible

# What Markdown, or the HTML that Markdown may hold, would take for its own.
_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~$&])")


def markdown_report(report: Report) -> str:
    """The report without plots and texts of pairs, in the Markdown that GitHub and HuggingFace render."""
    overall = report.metrics.overall
    lines = [
        "## Preference accuracy",
        "",
        f"**{percent(overall.accuracy)} %** of {count(overall.n_scored, 'scored pair')} right "
        f"(95 % interval {percent_interval(overall.interval)}), by `polar-ft eval`.",
        "",
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
