"""How figures, names and tables of both are written, the same on the screen and in every file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from polar_ft.evaluation.statistics.accuracy import Interval, PairMetrics

# Rows of a table at most: a field with a value a pair must not make a page of a million rows.
MAX_ROWS = 500

# What would change how the text around it is shown or break the page: control characters (line feed and tab
# are meant), what turns the writing direction (real Arabic or Hebrew needs none of it), half surrogate pairs.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


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


def signed_points(difference: float | None) -> str:
    """A difference of two shares in percentage points, with its sign.

    >>> signed_points(-0.0312), signed_points(0.5), signed_points(0.0)
    ('−3.1', '+50.0', '0.0')
    """
    if difference is None:
        return "–"
    rounded = f"{100 * difference:+.1f}"
    return "0.0" if float(rounded) == 0 else rounded.replace("-", "−")


def number(value: float | None) -> str:
    """A figure without a unit, short enough for a column.

    >>> [number(value) for value in (0.12345, 1234.5, 2.5e7, None)]
    ['0.123', '1234', '2.5e+07', '–']
    """
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.2g}" if abs(value) >= 1e5 else f"{value:.0f}"


def p_value(value: float | None) -> str:
    """A probability of chance; one that small is not written as zero.

    >>> p_value(0.0004), p_value(0.031)
    ('< 0.001', '0.031')
    """
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def count(n: int, noun: str) -> str:
    """A number of things.

    >>> count(1, "pair"), count(1200, "pair")
    ('1 pair', '1,200 pairs')
    """
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def visible(text: str) -> str:
    r"""The text with characters that would act instead of being shown spelled out.

    Escaping for HTML or Markdown is another matter, and comes after it.

    >>> visible("a\r\nb\x00\x1b[31m \u202Egnp.exe")
    'a\nb⟦U+0000⟧⟦U+001B⟧[31m ⟦U+202E⟧gnp.exe'
    """
    return _UNSAFE.sub(lambda match: f"⟦U+{ord(match[0]):04X}⟧", text.replace("\r\n", "\n"))


def one_line(text: str, limit: int = 60) -> str:
    r"""A name for a table or a plot: visible, on one line, cut in the middle to `limit` characters.

    Cut in the middle since long names of subsets are often paths, which differ at their end.

    >>> one_line("data/a folder/held_out.jsonl", limit=15)
    'data/a …t.jsonl'
    >>> one_line("two\nlines")
    'two lines'
    """
    name = " ".join(visible(text).split())
    if len(name) <= limit:
        return name
    tail = (limit - 1) // 2
    return f"{name[: limit - 1 - tail]}…{name[-tail:]}"


@dataclass(frozen=True)
class Row:
    """A row of a table: its name, its cells and whether it stands out."""

    name: str
    cells: tuple[str, ...]
    strong: bool = False


@dataclass(frozen=True)
class TextTable:
    """A table of texts.

    Attributes:
        caption: What it shows.
        headers: Of the column of names, then of each cell.
        rows: Each with as many cells as there are headers but the first.
        notes: Sentences that belong under it.
        explained: The last column is a sentence.
    """

    caption: str
    headers: tuple[str, ...]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    explained: bool = False


@dataclass(frozen=True)
class Section:
    """A section of the report.

    Attributes:
        id: Its anchor.
        title: Its heading.
        explanation: What it is about.
        tables: Its tables.
        plots: Names of the plots that belong to it; one that could not be drawn is not missed.
    """

    id: str
    title: str
    explanation: str
    tables: list[TextTable]
    plots: tuple[str, ...] = ()


def explained(caption: str, rows: Sequence[tuple[str, str, str]]) -> TextTable:
    """A table of figures, each with a sentence that says how to read it."""
    return TextTable(
        caption,
        ("figure", "value", "what it says"),
        [Row(name, (value, said)) for name, value, said in rows],
        explained=True,
    )


def largest(subsets: Mapping[str, PairMetrics], limit: int) -> tuple[Mapping[str, PairMetrics], list[str]]:
    """The subsets with the most pairs, in their order, and a note on the others where there are any.

    Args:
        subsets: Name → figures.
        limit: How many at most.
    """
    if len(subsets) <= limit:
        return subsets, []
    kept = set(sorted(subsets, key=lambda name: -subsets[name].n_pairs)[:limit])
    note = f"{count(len(subsets) - limit, 'smaller subset')} are in metrics.json alone."
    return {name: metrics for name, metrics in subsets.items() if name in kept}, [note]
