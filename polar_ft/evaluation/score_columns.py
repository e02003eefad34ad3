"""Columns of saved scores that grow block by block: numbers, counts, flags, and the values of a field."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from polar_ft.errors import PolarError
from polar_ft.evaluation.pairs import Categories

MAX_CATEGORIES = 1000

Row = dict[str, Any]

# No text is so long; 2**53 is where float64 no longer knows every integer.
_HUGE = 1 << 53

# Called with "file:line", column ("": the row) and what is wrong.
OnProblem = Callable[[str, str, str], None]


@dataclass(frozen=True)
class Block:
    """Some pairs of a file.

    Attributes:
        places: Where each stands, "file:line", `[pairs]`.
        rows: What the file says of each, `[pairs]`.
    """

    places: Sequence[str]
    rows: list[Row]

    @cached_property
    def fields(self) -> set[str]:
        """Every field that a row of the block has."""
        return set(chain.from_iterable(self.rows))

    def values(self, path: str) -> list[Any] | None:
        """The value of a field in each row, None where a row has none; None where no row can have one.

        >>> Block(["f:1", "f:2"], [{"id": "a", "meta": {"n": 1}}, {"id": "b"}]).values("meta.n")
        [1, None]
        """
        if path not in self.fields and path.partition(".")[0] not in self.fields:
            return None
        if path in self.fields:
            try:
                return list(map(itemgetter(path), self.rows))
            except KeyError:
                pass
        return list(map(_getter(path), self.rows))


def _as_number(value: Any) -> float | None:
    """A number, or a number in quotes as CSV has it; None for anything else.

    >>> _as_number("NaN"), _as_number("-Infinity"), _as_number("1.5"), _as_number("high"), _as_number(True)
    (nan, -inf, 1.5, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _as_count(value: Any) -> int | None:
    if type(value) is int:
        return value if 0 <= value < _HUGE else None
    number = _as_number(value)
    return int(number) if number is not None and number.is_integer() and 0 <= number < _HUGE else None


def as_flag(value: Any) -> bool | None:
    """The truth value that a cell spells; None where it spells none.

    >>> as_flag("True"), as_flag(0), as_flag("maybe")
    (True, False, None)
    """
    if isinstance(value, bool):
        return value
    return {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())


# Of a kind of column, by the type code of its array: dtype, what makes a value of it, what a value must be.
_KINDS: dict[str, tuple[Any, Callable[[Any], float | None], str]] = {
    "d": (np.float64, _as_number, "a number"),
    "q": (np.int64, _as_count, "a whole number, 0 or more"),
    "b": (np.bool_, as_flag, "true or false"),
}


class Column:
    """Numbers ("d"), counts ("q") or flags ("b") of a field; a row without a value adds ``fill``, if any."""

    def __init__(
        self, name: str, kind: str, *, path: str = "", fill: float | None = None, needed: bool = False
    ) -> None:
        self.name, self.path, self.fill, self.needed = name, path or name, fill, needed
        self.values: Any = array(kind)
        self.dtype, self.convert, self.expected = _KINDS[kind]

    def add(self, block: Block, problem: OnProblem) -> None:
        """Adds the rows of a block."""
        values = block.values(self.path)
        if values is None and self.fill is None and not self.needed:
            return
        values = values or [None] * len(block.rows)
        if self.dtype is np.float64 and set(map(type, values)) == {float}:
            self.values.extend(values)
            return
        for place, row, value in zip(block.places, block.rows, values, strict=True):
            converted = None if value is None else self.convert(value)
            if converted is not None:
                self.values.append(converted)
            elif value is not None:
                problem(place, self.name, f"is {_shown(value)} — must be {self.expected}")
            elif self.needed:
                problem(place, self.name, _missing(row))
            elif self.fill is not None:
                self.values.append(self.fill)


class SubsetField:
    """Values of one field of ``subset_by``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._codes = array("i")
        self._names: dict[str, int] = {}
        self._n_found = 0

    def add(self, block: Block) -> None:
        """Adds the rows of a block."""
        values, names = block.values(self.name), self._names
        if "extra" in block.fields:
            get = _getter(self.name)
            known = values or [None] * len(block.rows)
            values = [
                get(row["extra"]) if value is None and isinstance(row.get("extra"), dict) else value
                for value, row in zip(known, block.rows, strict=True)
            ]
        none = f"(no {self.name})"
        if values is None:
            values = [None] * len(block.rows)
        self._n_found += len(values) - values.count(None)
        texts = [
            value if type(value) is str else none if value is None else json.dumps(value, ensure_ascii=False)
            for value in values
        ]
        self._codes.extend([names.setdefault(text, len(names)) for text in texts])
        if len(names) > MAX_CATEGORIES:
            raise PolarError(
                f"the field {self.name} has more than {MAX_CATEGORIES} different values; name one "
                f"that names parts of the data, not rows"
            )

    def finish(self, file: Path, fields: Sequence[str], needed: bool) -> Categories | None:
        if not self._n_found:
            if needed:
                raise PolarError(
                    f"{file}: no row has the field {self.name!r} of --subset-by; the fields of the first "
                    f"row are {', '.join(fields)}"
                )
            return None
        ordered = sorted(self._names)
        rank = {name: number for number, name in enumerate(ordered)}
        recode = np.array([rank[name] for name in self._names], dtype=np.int32)
        return Categories(ordered, recode[np.frombuffer(self._codes, dtype=np.intc)])


def _missing(row: Mapping[str, Any]) -> str:
    others = ", ".join(list(row)[:8]) or "nothing"
    return f"is missing — the row has {others}{', …' if len(row) > 8 else ''}; rename the column or add it"


def _getter(path: str) -> Callable[[Mapping[str, Any]], Any]:
    """Reads a field by its name, or by a path with dots where no field has the whole name.

    >>> _getter("meta.source")({"meta": {"source": "wiki"}}), _getter("meta.source")({"meta": None})
    ('wiki', None)
    """
    first, *rest = path.split(".")
    if not rest:
        return lambda row: row.get(first)

    def get(row: Mapping[str, Any]) -> Any:
        if path in row:
            return row[path]
        value: Any = row.get(first)
        for key in rest:
            if not isinstance(value, Mapping):
                return None
            value = value.get(key)
        return value

    return get


def _shown(value: Any) -> str:
    """A wrong value for a message, short whatever its size."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:39]}…"
