"""Reads saved scores as columns: `scores.jsonl` of a run, or what another tool wrote, in any form of data.

What a row must and may say (a column that only some rows have is left out, with a warning)::

    chosen_score, rejected_score      numbers, or "NaN", "Infinity", "-Infinity"; other names and the result
                                      files of benchmarks: `polar_ft.evaluation.score_forms`      needed
    id                                name of the pair
    subset                            part of the data that it belongs to; so any field of --subset-by
    prompt_id (or prompt)             pairs with the same one are of one prompt
    chosen_chars, rejected_chars      characters of the candidates; so chosen_tokens, rejected_tokens
    prompt, chosen, rejected          texts, by which runs are compared
    cut                               whether anything was cut: true or false
    chosen_rouge, rejected_rouge, reference_is_chosen, shuffled_reference, empty_reference and cut by field
                                      as in a run's own `scores.jsonl`

A million rows take seconds and some hundred MB: rows are taken in blocks, and blocks become arrays.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import from_json

from polar_ft.data.reading import SUFFIXES, RowProblem, read_rows
from polar_ft.errors import DataError, PolarError
from polar_ft.evaluation.pairs import Categories, PairTable, Ranking
from polar_ft.evaluation.score_forms import Form, by_rows, find_form
from polar_ft.evaluation.scores import RANKINGS_FILE, SCORES_FILE, content_hash, prompt_id

CSV_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")

MAX_CATEGORIES = 1000

_BLOCK = 8192  # rows that become columns at once
_PROBLEMS_SHOWN = 20

_ROUGE = ("chosen_rouge", "rejected_rouge")
_CUT_FIELDS = ("prompt", "reference", "chosen", "rejected")

Row = dict[str, Any]

# No text is so long; 2**53 is where float64 no longer knows every integer.
_HUGE = 1 << 53

# Called with "file:line", column ("": the row) and what is wrong.
OnProblem = Callable[[str, str, str], None]


@dataclass(frozen=True)
class SavedScores:
    """What a file of scores holds.

    Attributes:
        table: The pairs by column.
        rankings: The ranked rows, where there is a `rankings.jsonl` next to the file or its rows are ranked.
        form: What the scores were read from.
        cut: Field → pairs of which it was cut; None where the file does not say.
        n_same_reference: Pairs that got a shuffled reference with the text of their own; None where the file
            does not say.
        warnings: What was left out and why, a sentence each.
    """

    table: PairTable
    rankings: list[Ranking]
    form: str
    cut: dict[str, int] | None
    n_same_reference: int | None
    warnings: list[str]


def find_scores(path: Path) -> Path:
    """The scores that a path means: a run folder's `scores.jsonl`, else the file or folder itself.

    Raises:
        PolarError: There is no such file or folder.
    """
    file = path / SCORES_FILE
    if file.is_file():
        return file
    if not path.exists():
        raise PolarError(
            f"{path}: no such file; name a folder that `polar-ft eval` wrote, or a file of scores"
        )
    if path.is_dir() and not any(each.name.endswith(SUFFIXES) for each in path.iterdir()):
        raise PolarError(
            f"{path}: no {SCORES_FILE} in this folder; name a folder that `polar-ft eval` wrote, or a file "
            f"of scores"
        )
    return path


def read_scores(path: Path, subset_by: Sequence[str] = ()) -> SavedScores:
    """Reads saved scores.

    Args:
        path: A run folder, or a file or folder in any form that data are read in.
        subset_by: Fields whose values pairs are grouped by, in addition to "subset": a name, or a path such
            as "meta.source" or "chosen_info.policy". What is not found in the row itself is looked for in its
            `extra`.

    Raises:
        PolarError: There is no such file, rows cannot be used (each is named with its column), or no row has
            a field of ``subset_by``.
    """
    file = find_scores(path)
    reader = _Reader(file, subset_by)
    rows = _rows(file)
    while block := list(islice(rows, _BLOCK)):
        reader.read(block)
        if len(reader.problems) > 10 * _PROBLEMS_SHOWN:
            break
    reader.raise_problems()
    ranked = file.with_name(RANKINGS_FILE)
    if file.name == SCORES_FILE and ranked.is_file():
        for place, row in _rows(ranked):
            reader.add_ranked(place, row)
        reader.raise_problems()
    return reader.finish()


class _Reader:
    """The columns of a file, growing block by block."""

    def __init__(self, file: Path, subset_by: Sequence[str]) -> None:
        self.file = file
        self.problems: list[str] = []
        self.n = 0
        self._form: Form | None = None
        self._prompt_codes: dict[str, int] = {}
        self._rankings: list[Ranking] = []
        columns = [
            _Column("chosen_score", "d", needed=True),
            _Column("rejected_score", "d", needed=True),
            *(_Column(name, "d", fill=math.nan) for name in _ROUGE),  # a row without a reference has none
            *(
                _Column(f"{kind}_{role}", "d", path=f"{kind}_reference.{role}_score")
                for kind in ("shuffled", "empty")
                for role in ("chosen", "rejected")
            ),
            *(
                _Column(f"{role}_{unit}", "q")
                for unit in ("chars", "tokens")
                for role in ("chosen", "rejected")
            ),
            _Column("cut", "b"),
            _Column("reference_is_chosen", "b"),
        ]
        self._columns = {column.name: column for column in columns}
        self._columns["cut"].convert = self._cut_flag
        self._cut = dict.fromkeys(_CUT_FIELDS, 0)
        self._n_cut_by_field = self._n_same_reference = self._n_shuffled = 0
        self._prompts = array("q")
        self._contents = array("Q")
        self._contents_of: set[str] = set()
        self._ids: list[str] = []
        # dict.fromkeys: once each, "subset" first
        self._subsets = [_SubsetField(name) for name in dict.fromkeys(("subset", *subset_by))]
        self._asked = set(subset_by)
        self._first_fields: list[str] = []

    def problem(self, place: str, column: str, reason: str) -> None:
        """Notes what is wrong with a row, or with the file where the line is 0."""
        place = place.removesuffix(":0")
        self.problems.append(": ".join(part for part in (place, column, reason) if part))

    def read(self, rows: Sequence[tuple[str, Row | RowProblem]]) -> None:
        """Takes rows apart into pairs and adds these to every column."""
        places, pairs = [], []
        for place, row in rows:
            if isinstance(row, RowProblem):
                self.problems.append(str(row))
                continue
            if self._form is None:
                try:
                    self._form = find_form(row)
                except PolarError as error:
                    raise PolarError(f"{place}: {error}") from None
            form = self._form
            try:
                of_row = [row] if form.pairs is None else form.pairs(row)
            except ValueError as error:
                self.problem(place, "", str(error))
                continue
            pairs += of_row
            places += [place] * len(of_row)
            if form.ranked is not None:
                self.add_ranked(place, form.ranked(row))
        if pairs:
            self._add(Block(places, pairs))

    def _add(self, block: Block) -> None:
        if not self.n:
            self._first_fields = list(block.rows[0])
        for column in self._columns.values():
            column.add(block, self.problem)
        for shuffled in block.values("shuffled_reference") or ():
            if isinstance(shuffled, dict):
                self._n_shuffled += 1
                self._n_same_reference += shuffled.get("same_reference") is True
        self._add_prompts(block)
        self._add_contents(block)
        self._add_ids(block)
        for subset in self._subsets:
            subset.add(block)
        self.n += len(block.rows)

    def _cut_flag(self, value: Any) -> bool | None:
        if not isinstance(value, dict):
            return _as_flag(value)
        self._n_cut_by_field += 1
        cut = [name for name in _CUT_FIELDS if value.get(name)]
        for name in cut:
            self._cut[name] += 1
        return bool(cut)

    def _add_contents(self, block: Block) -> None:
        """Hashes of the texts of each pair: as the run wrote them, or of the texts where those are there."""
        hashes = block.values("input_hash")
        if hashes is not None:
            self._contents_of.add("input_hash")
            self._contents.extend([int(value[:16], 16) for value in hashes if _is_hash(value)])
            return
        texts = [block.values(name) for name in ("prompt", "reference", "chosen", "rejected")]
        if texts[2] is not None and texts[3] is not None:
            self._contents_of.add("texts")
            columns = [values or [None] * len(block.rows) for values in texts]
            rows = zip(*columns, strict=True)
            self._contents.extend(
                [int(content_hash(row)[:16], 16) for row in rows if None not in (row[2], row[3])]
            )

    def _add_prompts(self, block: Block) -> None:
        codes = self._prompt_codes
        values = block.values("prompt_id")
        if values is None:
            texts = block.values("prompt") or ()
            values = [None if text is None else prompt_id(str(text)) for text in texts]
        self._prompts.extend(
            [codes.setdefault(str(value), len(codes)) for value in values if value is not None]
        )

    def _add_ids(self, block: Block) -> None:
        values = block.values("id") or []
        # A ranked row has several pairs, and an id must name one.
        for name, pair in zip(values, block.values("pair") or [None] * len(values), strict=True):
            if name is not None:
                own = not isinstance(pair, list) or len(pair) != 2 or pair == [0, 1]
                self._ids.append(str(name) if own else f"{name} ({pair[0]}>{pair[1]})")

    def raise_problems(self) -> None:
        """Raises a `DataError` that names the first lines that cannot be used; nothing without any."""
        if not self.problems and not self.n:
            self.problem(str(self.file), "", "has no rows — an empty file is no scores; check the path")
        if not self.problems:
            return
        shown = "\n".join(f"  {problem}" for problem in self.problems[:_PROBLEMS_SHOWN])
        rest = len(self.problems) - _PROBLEMS_SHOWN
        more = (
            f"\n  … and {'at least ' if rest > 9 * _PROBLEMS_SHOWN else ''}{rest:,} more" if rest > 0 else ""
        )
        raise DataError(f"the scores cannot be used:\n{shown}{more}", self.problems)

    def add_ranked(self, place: str, row: Row | RowProblem) -> None:
        """Adds a row of `rankings.jsonl`."""
        codes = self._prompt_codes
        if isinstance(row, RowProblem):
            self.problems.append(str(row))
            return
        try:
            candidates = row["candidates"]
            ranking = Ranking(
                id=str(row["id"]),
                subset=row["subset"],
                prompt=codes.setdefault(row["prompt_id"], len(codes)),
                model_scores=np.array([float(each["score"]) for each in candidates]),
                given=np.array([float(each["given"]) for each in candidates]),
                info=[each["info"] for each in candidates],
                benchmark=row.get("benchmark"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PolarError(
                f"{place}: is no ranked row of `polar-ft eval` ({type(error).__name__}: {error}); "
                f"remove the file to leave the ranking figures out"
            ) from error
        self._rankings.append(ranking)

    def finish(self) -> SavedScores:
        """The columns that all rows have, as arrays."""
        assert self._form is not None
        grown = {column.name: column.values for column in self._columns.values()}
        grown |= {"prompt_id": self._prompts, "id": self._ids}
        complete = {name: values if len(values) == self.n else None for name, values in grown.items()}
        warnings = [
            f"{self.file}: {name} is missing in {self.n - len(values):,} of {self.n:,} rows, so it is left "
            f"out with the figures that need it."
            for name, values in grown.items()
            if 0 < len(values) < self.n
        ]
        arrays: dict[str, Any] = {
            name: None if (values := complete[name]) is None else np.frombuffer(values, dtype=column.dtype)
            for name, column in self._columns.items()
        }
        for name in _ROUGE:  # NaN for a row without a reference; for all of them it is no column
            if arrays[name] is not None and np.isnan(arrays[name]).all():
                arrays[name] = None
        subsets = {}
        for subset in self._subsets:
            values = subset.finish(self.file, self._first_fields, needed=subset.name in self._asked)
            if values is not None:
                subsets[subset.name] = values
        prompts = complete["prompt_id"]
        alike = len(self._contents) == self.n and len(self._contents_of) == 1
        return SavedScores(
            table=PairTable(
                ids=complete["id"],
                subsets=subsets,
                prompts=None if prompts is None else np.frombuffer(prompts, dtype=np.int64),
                contents=np.frombuffer(self._contents, np.uint64) if alike else None,
                contents_of=self._contents_of.pop() if alike else "",
                **arrays,
            ),
            rankings=self._rankings,
            form=self._form.name,
            cut=self._cut if self._n_cut_by_field == self.n else None,
            n_same_reference=self._n_same_reference if self._n_shuffled == self.n else None,
            warnings=warnings,
        )


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


def _as_flag(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    return {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())


# Of a kind of column, by the type code of its array: dtype, what makes a value of it, what a value must be.
_KINDS: dict[str, tuple[Any, Callable[[Any], float | None], str]] = {
    "d": (np.float64, _as_number, "a number"),
    "q": (np.int64, _as_count, "a whole number, 0 or more"),
    "b": (np.bool_, _as_flag, "true or false"),
}


class _Column:
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


class _SubsetField:
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


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) >= 16 and not set(value[:16]) - set("0123456789abcdef")


def _missing(row: Mapping[str, Any]) -> str:
    others = ", ".join(list(row)[:8]) or "nothing"
    return f"is missing — the row has {others}{', …' if len(row) > 8 else ''}; rename the column or add it"


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


def _rows(file: Path) -> Iterator[tuple[str, Row | RowProblem]]:
    """The rows of a file or folder; also of CSV, and of an object whose values are columns."""
    name = file.name.lower()
    if name.endswith(CSV_SUFFIXES) and not file.is_dir():
        yield from _csv_rows(file)
        return
    table = _one_object(file) if name.endswith((".json", ".json.gz")) and file.is_file() else None
    if table is not None and (rows := by_rows(table)) is not None:
        yield from ((f"{file}:{number}", row) for number, row in enumerate(rows, 1))
        return
    for place, row in read_rows(file):
        if isinstance(row, dict) and place.endswith(":1") and (rows := by_rows(row)) is not None:
            yield from ((f"{file}:{number}", each) for number, each in enumerate(rows, 1))
        else:
            yield place, row


def _one_object(file: Path) -> Row | None:
    """What a file holds that is one object over several lines; None where it is not."""
    opened = gzip.open if file.name.endswith(".gz") else open
    try:
        with opened(file, "rb") as stream:
            if stream.readline().strip() != b"{":
                return None
            value = from_json(b"{" + stream.read())
    except (OSError, EOFError, ValueError, zlib.error):
        return None  # reported where the rows are read
    return value if isinstance(value, dict) else None


def _csv_rows(file: Path) -> Iterator[tuple[str, Row | RowProblem]]:
    """Rows of CSV, with commas, semicolons or tabs: what the first line has most of."""
    opened = gzip.open if file.name.endswith(".gz") else open
    try:
        with opened(file, "rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as stream:  # type: ignore[type-var]
            first = stream.readline()
            stream.seek(0)
            reader = csv.reader(stream, delimiter=max(",;\t", key=first.count))
            names = [name.strip() for name in next(reader, ())]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise PolarError(f"{file}:1: column {twice[0]!r} stands there twice; rename one of the two")
            for cells in reader:
                place = f"{file}:{reader.line_num}"
                if len(cells) == len(names):
                    yield place, {name: cell or None for name, cell in zip(names, cells, strict=True)}
                elif cells:
                    reason = f"has {len(cells)} cells, the first line {len(names)} columns"
                    yield place, RowProblem(str(file), reader.line_num, "", reason)
    except csv.Error as error:
        raise PolarError(f"{file}:{reader.line_num}: is not CSV ({error})") from error
    except UnicodeDecodeError as error:
        raise PolarError(f"{file}: is not valid UTF-8 ({error}); save it as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise PolarError(f"{file}: cannot be read ({error}); the file is damaged") from error


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
