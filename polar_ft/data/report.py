"""Prints the report of `polar_ft.data.lint.check` on a terminal of 100 columns."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from polar_ft.data.lint import FIELDS, NAMED, DataReport, Lengths
from polar_ft.data.problems import PROBLEMS_SHOWN, FileProblem, RowProblem
from polar_ft.errors import printable

SUBSETS_SHOWN = 20

_FINDINGS = {
    "held_out_prompts": "prompt is held out",
    "chosen_equals_rejected": "chosen = rejected",
    "duplicate_pairs": "duplicates",
    "contradictory_pairs": "contradictions",
    "empty": "empty",
    "repeated_ids": "repeated ids",
}


def show_problems(console: Console, problems: Sequence[RowProblem], more: str = "") -> None:
    """Prints the first bad rows, and all damaged files, each on one line, however long.

    Args:
        console: Where to print.
        problems: The bad rows and files.
        more: Where the others are found; follows their number.
    """
    rows = [problem for problem in problems if not isinstance(problem, FileProblem)]
    for problem in rows[:PROBLEMS_SHOWN]:
        console.print(f"[red]bad row[/] {escape(str(problem))}", soft_wrap=True)
    if len(rows) > PROBLEMS_SHOWN:
        console.print(f"… and {many(len(rows) - PROBLEMS_SHOWN, 'bad row')} more{more}")
    for problem in problems:
        if isinstance(problem, FileProblem):
            console.print(f"[red]bad file[/] {escape(str(problem))}", soft_wrap=True)


def show_report(console: Console, report: DataReport) -> None:
    """Prints the bad rows, then the counts of the report."""
    show_problems(console, report.problems, " (--json lists them all)")
    if report.problems:
        console.print()
    damaged = sum(isinstance(problem, FileProblem) for problem in report.problems)
    counts = ((report.bad_rows - damaged, "bad row"), (damaged, "bad file"))
    bad = "".join(f", [red]{many(count, thing)}[/]" for count, thing in counts if count)
    console.print(
        f"[bold]{_plain(', '.join(report.files))}[/]: "
        f"{many(report.rows, 'row')}, {many(report.pairs, 'pair')}, {many(report.prompts, 'prompt')}{bad}",
        soft_wrap=True,
    )
    if not report.rows:
        _show_warnings(console, report)
        return
    title = f"[bold]lengths in {report.unit}[/]"
    if report.unit == "tokens":
        title += (
            f" (limits: {report.max_length:,} in all, {report.max_response_length:,} a response; BOS counted)"
        )
    else:
        title += " (add --tokenizer FOLDER for tokens and for what is cut)"
    parts = [
        (title, _lengths_table(report)),
        (f"[bold]how many have so many {report.unit}[/]", _histogram_table(report.lengths, report.unit)),
        ("[bold]pairs[/]", _findings_table(report)),
    ]
    if set(report.subsets) != {""}:
        parts.append(("[bold]subsets[/]", _subsets_table(report)))
    for title, table in parts:
        console.print(f"\n{title}", soft_wrap=True)
        console.print(table)
    if report.named:
        console.print("\n[bold]rows[/]")
    for finding, label in _FINDINGS.items():
        if rows := report.named.get(finding):
            more = ", …" if len(rows) == NAMED else ""
            console.print(f"[yellow]{label}[/]: {_plain(', '.join(rows))}{more}", soft_wrap=True)
    _show_warnings(console, report)
    if report.extra_fields:
        names = ", ".join(f"{name} ({count:,})" for name, count in report.extra_fields.items())
        console.print(f"\n[bold]extra fields[/] (kept, in so many rows): {_plain(names)}")


def _show_warnings(console: Console, report: DataReport) -> None:
    for warning in report.warnings:
        console.print(f"\n[yellow]warning[/] {_plain(warning)}", soft_wrap=True)


def report_as_json(report: DataReport) -> str:
    """The report as JSON that can be printed: it holds control characters as escapes only."""
    text = json.dumps(report.model_dump(), indent=2, ensure_ascii=False)
    return re.sub(
        r"[\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", lambda c: rf"\u{ord(c[0]):04x}", text
    )


def _plain(text: str) -> str:
    """Text of the data for the terminal: without markup and control characters, on one line."""
    return escape(printable(text).replace("\n", "\\n"))


def many(count: int, thing: str) -> str:
    """Formats a count with its noun.

    >>> many(1, "row"), many(2000, "row")
    ('1 row', '2,000 rows')
    """
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def number_table(columns: Sequence[str]) -> Table:
    """Makes a table without lines; the first column is text, the others are numbers."""
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", header_style="dim", no_wrap=True)
    return table


def _lengths_table(report: DataReport) -> Table:
    columns = ["", "mean", "50 %", "90 %", "99 %", "longest", "empty"]
    if report.truncated:
        columns += ["fields cut", "tokens cut", "on the"]
    table = number_table(columns)
    for name, lengths in report.lengths.items():
        percentiles = (lengths.p50, lengths.p90, lengths.p99, lengths.max)
        cells = [name, f"{lengths.mean:,.1f}", *(f"{length:,}" for length in percentiles)]
        cells.append(_flagged(report.empty[name], name != "reference") if name in FIELDS else "")
        if name in report.truncated:
            cut = report.truncated[name]
            cells += [_flagged(cut.count), f"{cut.tokens:,}", cut.side if cut.count else ""]
        table.add_row(*cells)
    return table


def _histogram_table(lengths: dict[str, Lengths], unit: str) -> Table:
    """Table of how many fields have which length: a column for each field, a line for each range."""
    width = 9
    table = Table(box=None, pad_edge=False)
    table.add_column(unit, justify="right", header_style="dim", no_wrap=True)
    for name in lengths:
        table.add_column(name, header_style="dim", no_wrap=True)
    ranges = sorted({(low, high) for field in lengths.values() for low, high, _ in field.histogram})
    counts = {name: {low: count for low, _, count in field.histogram} for name, field in lengths.items()}
    for low, high in ranges:
        cells = [f"{low:,}" if low == high else f"{low:,}–{high:,}"]
        for name in lengths:
            count, most = counts[name].get(low, 0), max(counts[name].values())
            cells.append(f"[cyan]{_bar(count / most, width)}[/] {count:,}" if count else "")
        table.add_row(*cells)
    return table


def _bar(share: float, width: int) -> str:
    """A bar in eighths of a character, at least one eighth.

    >>> _bar(0.5, 4), _bar(0.001, 4)
    ('██', '▏')
    """
    eighths = max(1, round(share * width * 8))
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]


def _flagged(count: int, flag: bool = True) -> str:
    return f"[yellow]{count:,}[/]" if count and flag else f"{count:,}"


def _findings_table(report: DataReport) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")

    def share(count: int) -> str:
        return f"{count / report.pairs:.1%}" if report.pairs else ""

    same = report.chosen_equals_rejected
    equal_length = report.pairs - report.chosen_longer - report.chosen_shorter
    table.add_row("chosen is the longer one", f"{report.chosen_longer:,}", share(report.chosen_longer))
    table.add_row("chosen is the shorter one", f"{report.chosen_shorter:,}", share(report.chosen_shorter))
    table.add_row("both are equally long", f"{equal_length:,}", share(equal_length))
    table.add_row("chosen = rejected", _flagged(same), share(same))
    after = report.chosen_equals_rejected_after_truncation
    if after is not None:
        table.add_row("chosen = rejected after truncation", _flagged(after), share(after))
    for label, count in (
        ("reference = chosen", report.reference_equals_chosen),
        ("reference = rejected", report.reference_equals_rejected),
        ("duplicates of an earlier pair", report.duplicate_pairs),
        ("an earlier pair, chosen and rejected exchanged", report.contradictory_pairs),
    ):
        table.add_row(label, _flagged(count), share(count))
    if report.held_out_prompts is not None:
        table.add_row("prompts of the held-out data", _flagged(report.held_out_prompts), "rows")
    if report.repeated_ids:
        table.add_row("ids of an earlier row", _flagged(report.repeated_ids), "rows")
    if report.rows_with_several_references:
        several = f"{report.rows_with_several_references:,}"
        table.add_row("several references (training takes the first)", several, "rows")
    if report.ties_left_out:
        table.add_row("ties of ranked rows, left out", f"{report.ties_left_out:,}")
        table.add_row("ranked rows that are nothing but ties", _flagged(report.rows_without_pairs), "rows")
    if len(report.files) > 1:
        table.add_row("prompts that several files have", _flagged(report.prompts_in_several_files), "prompts")
    return table


def _subsets_table(report: DataReport) -> Table:
    table = number_table(["", "rows", "pairs"])
    ordered = sorted(report.subsets.items(), key=lambda item: -item[1].rows)
    for name, count in ordered[:SUBSETS_SHOWN]:
        table.add_row(_plain(name) or "[dim](none)[/]", f"{count.rows:,}", f"{count.pairs:,}")
    if len(ordered) > SUBSETS_SHOWN:
        table.add_row(f"[dim]… and {len(ordered) - SUBSETS_SHOWN:,} more (--json)[/]")
    return table
