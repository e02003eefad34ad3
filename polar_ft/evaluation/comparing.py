"""`polar-ft eval compare`: which of several runs is better on the same pairs, on the screen and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from polar_ft.errors import PolarError
from polar_ft.evaluation.report.table import TABLE_WIDTH
from polar_ft.evaluation.report.texts import number, one_line, p_value, percent, signed_points
from polar_ft.evaluation.scores_file import find_scores, read_scores
from polar_ft.evaluation.statistics.comparison import Comparison, PairedDifference, compare
from polar_ft.files import write_atomically

COMPARE_FILE = "compare.json"
_SHOWN_PAIRS = 10


class RunComparison(BaseModel):
    """One run against the first.

    Attributes:
        run: The run's folder or file, B of the comparison.
        comparison: The figures.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    comparison: Comparison


class Comparisons(BaseModel):
    """The content of `compare.json`.

    Attributes:
        schema_version: Raised when a field changes its meaning.
        created: UTC time, ISO 8601.
        base: The first run, A of every comparison.
        runs: The others against it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 2
    created: str
    base: str
    runs: list[RunComparison]


def compare_runs(runs: Sequence[Path], out_dir: Path, subset_by: Sequence[str]) -> Comparisons:
    """Compares every run with the first, shows the figures and writes `compare.json`.

    Args:
        runs: Folders of runs, or files of scores; at least two.
        out_dir: Where `compare.json` goes.
        subset_by: Fields to group by, in addition to "subset"; the values are those of the first run.

    Raises:
        PolarError: Scores cannot be read, runs share no pair, or the file cannot be written.
    """
    if len(runs) < 2:
        raise PolarError("comparing takes two runs or more: polar-ft eval compare A B")
    for run in runs:
        find_scores(run)  # a wrong path is an error before minutes of reading
    console = Console()
    console.width = min(console.width, TABLE_WIDTH) if console.is_terminal else TABLE_WIDTH
    base = read_scores(runs[0], subset_by)
    compared = []
    for run in runs[1:]:
        other = read_scores(run)
        try:
            comparison = compare(base.table, other.table)
        except PolarError as error:
            raise PolarError(f"A is {runs[0]}, B is {run}: {error}") from error
        result = RunComparison(run=str(run), comparison=comparison)
        _show(console, str(runs[0]), result, [*base.warnings, *other.warnings])
        compared.append(result)
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    everything = Comparisons(created=created, base=str(runs[0]), runs=compared)
    file = _write(everything, out_dir)
    console.print(f"wrote {file}", highlight=False, markup=False, soft_wrap=True)
    return everything


def _show(console: Console, base: str, result: RunComparison, warnings: Sequence[str]) -> None:
    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, highlight=False, markup=False)

    comparison, overall = result.comparison, result.comparison.overall
    say(f"\nA  {one_line(base, 90)}\nB  {one_line(result.run, 90)}", "bold")
    say(
        f"B − A: {signed_points(overall.difference)} points (95 % interval {_interval(overall)}), "
        f"p {_is(overall.p_value)}, on {overall.n_pairs:,} pairs that both have scored\n",
        "bold",
    )
    for field, rows in comparison.subsets.items():
        console.print(_table(field, rows, overall))
        say("")
    if not comparison.subsets:
        console.print(_table("", {}, overall))
        say("")
    if comparison.most_different:
        console.print(_pairs(comparison))
        say("")
    for note in [*_notes(result), *warnings]:
        say(note)
    say("")


def _table(field: str, rows: dict[str, PairedDifference], overall: PairedDifference) -> Table:
    table = _bare_table(field if field != "subset" else "")
    columns = ("pairs", "A\n%", "B\n%", "B − A\npoints", "95 %\ninterval", "p", "p\n(Holm)", "only A\nright")
    for header in (*columns, "only B\nright"):
        table.add_column(header, justify="right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(Text(one_line(name, 40)), *_cells(row))
    table.add_section()
    table.add_row("all pairs", *_cells(overall), style="bold")
    return table


def _cells(row: PairedDifference) -> list[str]:
    return [
        f"{row.n_pairs:,}",
        percent(row.accuracy_a),
        percent(row.accuracy_b),
        signed_points(row.difference),
        _interval(row),
        p_value(row.p_value),
        p_value(row.p_holm) if row.p_holm is not None else "",
        f"{row.n_only_a:,}",
        f"{row.n_only_b:,}",
    ]


def _pairs(comparison: Comparison) -> Table:
    table = _bare_table("most different pairs")
    for header in ("margin in A", "margin in B"):
        table.add_column(header, justify="right", no_wrap=True)
    for pair in comparison.most_different[:_SHOWN_PAIRS]:
        table.add_row(Text(one_line(pair.id, 60)), number(pair.margin_a), number(pair.margin_b))
    return table


def _bare_table(name: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(name, overflow="fold", min_width=len("all pairs"))
    return table


def _is(p: float | None) -> str:
    text = p_value(p)
    return text if text.startswith("<") else f"= {text}"


def _interval(row: PairedDifference) -> str:
    if row.difference_ci95 is None:
        return "–"
    low, high = row.difference_ci95
    return f"{signed_points(low)} to {signed_points(high)}"


def _notes(result: RunComparison) -> list[str]:
    comparison, overall = result.comparison, result.comparison.overall
    drawn = "pairs" if overall.n_prompts is None else f"{overall.n_prompts:,} prompts"
    notes = [
        f"Accuracies are over the same pairs, matched by their {comparison.matched_by}. Interval and p come "
        f"from a paired bootstrap over {drawn}; p (Holm) is corrected for the number of rows of its table."
    ]
    if overall.p_mcnemar is not None:
        notes.append(
            f"A alone is right on {overall.n_only_a:,} pairs, B alone on {overall.n_only_b:,}: exact McNemar "
            f"test p {_is(overall.p_mcnemar)}, which takes pairs as independent."
        )
    left_out = [
        f"{n:,} {what}"
        for n, what in (
            (comparison.n_only_in_a, "pairs that only A has"),
            (comparison.n_only_in_b, "pairs that only B has"),
            (comparison.n_nonfinite, "pairs without finite scores in both"),
        )
        if n
    ]
    if left_out:
        notes.append(f"Left out: {', '.join(left_out)}.")
    if comparison.n_other_texts:
        notes.append(
            f"WARNING: {comparison.n_other_texts:,} pairs have other texts in B than in A though their ids "
            f"are the same: the runs are not over the same data. They are left out."
        )
    if comparison.most_different:
        notes.append(
            "Most different: margins (chosen minus rejected score) furthest apart, each run's in units of "
            "its own spread."
        )
    return notes


def _write(comparisons: Comparisons, out_dir: Path) -> Path:
    file = out_dir / COMPARE_FILE
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(file, f"{comparisons.model_dump_json(indent=2)}\n")
    except OSError as error:
        raise PolarError(
            f"{file}: cannot be written ({error.strerror or error}); name another folder with --out"
        ) from error
    return file
