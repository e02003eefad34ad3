"""Tables of texts: what a section of a report holds, whatever page it stands on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from polar_ft.evaluation.report.numbers import count
from polar_ft.evaluation.statistics.accuracy import PairMetrics

# Rows of a table at most: a field with a value a pair must not make a page of a million rows.
MAX_ROWS = 500


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
