"""Finds the format of rows by looking at some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

from polar_ft.data.converters.format import MEDIA, Converted, Format, Layout
from polar_ft.data.converters.mapping import mapped, proposal
from polar_ft.data.reading import MAX_LINE_MB, RowProblem, expand, read_rows
from polar_ft.data.records import PairRow, RankedRow, RowError, parse_row
from polar_ft.errors import PolarError

_READ_AT_LEAST = 0.5
_FILES, _ROWS_OF_A_FILE = 8, 50

Sample = Sequence[tuple[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Recognised:
    """The format of some rows, and how sure that is.

    Attributes:
        name: The format.
        looked_at: Number of rows.
        read: How many of them the format can read.
        known: The fields of the rows that its layout names.
        unknown: The other fields of the rows.
        same: Other formats that convert these rows to the same.
        rivals: Other formats that read as many of the rows, and convert them to something else.
        undecided: The rivals that read the same fields, between which the rows do not decide.
        guessed: Whether rows do not say where their prompt ends.
    """

    name: str
    looked_at: int
    read: int
    known: tuple[str, ...]
    unknown: tuple[str, ...]
    same: tuple[str, ...]
    rivals: tuple[str, ...]
    undecided: tuple[str, ...]
    guessed: bool = False

    @property
    def certainty(self) -> Literal["certain", "likely", "doubtful"]:
        """Certain if no other format reads all rows; doubtful if this one does not, or guesses prompts."""
        if self.read < self.looked_at or self.undecided or self.guessed:
            return "doubtful"
        return "likely" if self.rivals else "certain"


@dataclass(frozen=True)
class _Reading:
    name: str
    format: Format
    read: int
    known: tuple[str, ...]
    rows: list[dict[str, Any]]
    guessed: bool


def recognise_file(
    formats: Mapping[str, Format],
    source: str,
    *,
    split: str = "train",
    max_line_mb: float = MAX_LINE_MB,
    mapping: Mapping[str, str] | None = None,
) -> Recognised:
    """Finds the format of a file or data set by its first rows, that of a folder by several of its files.

    Args:
        formats: See `recognise`.
        source: See `polar_ft.data.reading.DataSource.path`.
        split: Split of a HuggingFace data set.
        max_line_mb: Longest line that is read, in 2**20 bytes.
        mapping: See `polar_ft.data.converters.mapping.mapped`.

    Raises:
        PolarError: No format reads the rows, or they do not decide between two.
    """
    files = expand(source, recursive=True)
    sample: list[tuple[str, dict[str, Any]]] = []
    problems: list[RowProblem] = []
    for file in files[:: max(1, len(files) // _FILES)]:
        rows = read_rows(file, split, max_line_mb=max_line_mb)
        for place, row in islice(rows, _ROWS_OF_A_FILE):
            try:
                if isinstance(row, RowProblem):
                    problems.append(row)
                else:
                    sample.append((place, mapped(row, mapping or {})))
            except RowError as error:
                problems.append(RowProblem.at(place, error))
    if not sample:
        raise PolarError(f"{source}: has no row that can be read; the first: {problems[0]}")
    found = recognise(formats, sample)
    fields = _fields(sample)
    if found is None:
        hint = (
            proposal(fields) or "--map prompt=NAME,chosen=NAME,rejected=NAME, with the names of your fields"
        )
        message = (
            f"{source}: no known format has these rows (their fields: {', '.join(fields)}). If they are "
            f"pairs, say which field is which: {hint}"
        )
        if media := sum(any(row.get(column) for column in MEDIA) for _, row in sample):
            message += (
                f". Of the rows looked at, {media:,} have images, sounds or videos, which cannot be read"
            )
        raise PolarError(message)
    if found.undecided:
        names = " or ".join((found.name, *found.undecided))
        raise PolarError(
            f"{source}: this layout is read in several ways, which give other pairs; name one of them "
            f"instead of auto: {names}"
        )
    return replace(found, looked_at=found.looked_at + len(problems))


def recognise(formats: Mapping[str, Format], rows: Sample) -> Recognised | None:
    """Finds the format that reads most of the rows.

    Among several it is the one that names most of their fields, and among those the first.

    Args:
        formats: All formats by name, special ones before general ones.
        rows: Some rows with their places.

    Returns:
        The format; None if none reads half of the rows.
    """
    fields = _fields(rows)
    readings = [_try(name, fmt, rows, fields) for name, fmt in formats.items()]
    readings = [reading for reading in readings if reading.read >= max(1, _READ_AT_LEAST * len(rows))]
    if not readings:
        return None
    best = max(readings, key=lambda reading: (reading.read, len(reading.known)))
    others = [reading for reading in readings if reading is not best and reading.read == best.read]
    same = [other for other in others if best.format.gather is None and other.rows == best.rows]
    rivals = [other for other in others if other not in same]
    undecided = [rival for rival in rivals if rival.known == best.known and rival.format.gather is not None]
    return Recognised(
        best.name,
        len(rows),
        best.read,
        best.known,
        tuple(field for field in fields if field not in best.known),
        tuple(other.name for other in same),
        tuple(rival.name for rival in rivals),
        tuple(rival.name for rival in undecided),
        best.guessed,
    )


def reads(fmt: Format, place: str, row: Mapping[str, Any]) -> bool:
    """Whether a row has the layout of a format."""
    return _convert(fmt, place, row) is not None


def _fields(rows: Sample) -> list[str]:
    return list(dict.fromkeys(key for _, row in rows for key, value in row.items() if value is not None))


def _convert(fmt: Format, place: str, row: Mapping[str, Any]) -> Converted | None:
    try:
        converted = fmt.convert(row if fmt.gather is None else [row], **fmt.options_at(place))
        for made in converted.rows:
            parse_row(made)
            # RewardBench's layout is that of many rows; what is its own are the names of its subsets.
            if made.get("benchmark") == "rewardbench" and "section" not in made:
                return None
    except RowError:
        return None
    return converted


def _try(name: str, fmt: Format, rows: Sample, fields: Sequence[str]) -> _Reading:
    made = [converted for place, row in rows if (converted := _convert(fmt, place, row)) is not None]
    named = _fields_of(fmt.layout or name)
    known = tuple(field for field in fields if field in named)
    guessed = any(converted.guessed for converted in made)
    return _Reading(name, fmt, len(made), known, [row for one in made for row in one.rows], guessed)


def _fields_of(layout: str) -> set[str]:
    """The fields that a layout names, as they are called in files."""
    classes = [cls for cls in Layout.__subclasses__() if layout == cls.LAYOUT]
    models = (PairRow, RankedRow) if layout == "ranked" else classes
    return {field.alias or name for model in models for name, field in model.model_fields.items()}
