"""Saved scores as columns: `scores.jsonl` of a run, or what another tool wrote, as JSON lines or CSV.

What a line must and may say (a column that only some lines have is left out, with a warning)::

    chosen_score, rejected_score      numbers, or "NaN", "Infinity", "-Infinity"                    needed
    id                                name of the pair, by which runs are compared
    subset                            part of the data that it belongs to; so any field of --subset-by
    prompt_id (or prompt)             pairs with the same one are of one prompt
    chosen_chars, rejected_chars      characters of the candidates; so chosen_tokens, rejected_tokens
    cut                               whether anything was cut: true or false
    chosen_rouge, rejected_rouge, reference_is_chosen, shuffled_reference, empty_reference and cut by field
                                      as in a run's own `scores.jsonl`

A million lines take seconds and some hundred MB: lines are read in blocks, and blocks become arrays.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from polar_ft.errors import DataError, PolarError
from polar_ft.evaluation.pairs import Categories, PairTable, Ranking
from polar_ft.evaluation.score_lines import Block, getter, read_blocks, shown
from polar_ft.evaluation.scores import RANKINGS_FILE, SCORES_FILE, prompt_id

MAX_CATEGORIES = 1000

_PROBLEMS_SHOWN = 20

_SCORES = ("chosen_score", "rejected_score")
_ROUGE = ("chosen_rouge", "rejected_rouge")
_COUNTS = ("chosen_chars", "rejected_chars", "chosen_tokens", "rejected_tokens")
_OTHER_SCORES = {
    "shuffled_chosen": "shuffled_reference.chosen_score",
    "shuffled_rejected": "shuffled_reference.rejected_score",
    "empty_chosen": "empty_reference.chosen_score",
    "empty_rejected": "empty_reference.rejected_score",
}
_CUT_FIELDS = ("prompt", "reference", "chosen", "rejected")

# No text is so long; 2**53 is where float64 no longer knows every whole number.
_HUGE = 1 << 53


@dataclass(frozen=True)
class SavedScores:
    """What a file of scores holds.

    Attributes:
        table: The pairs by column.
        rankings: The ranked rows, where there is a `rankings.jsonl` next to the file.
        cut: Field → pairs of which it was cut; None where the file does not say.
        input_hashes: Hash of the texts of each pair's row, uint64 `[pairs]`; None where the file does not
            say.
        n_same_reference: Pairs that got a shuffled reference with the text of their own; None where the file
            does not say.
        warnings: What was left out and why, a sentence each.
    """

    table: PairTable
    rankings: list[Ranking]
    cut: dict[str, int] | None
    n_same_reference: int | None
    input_hashes: NDArray[np.uint64] | None
    warnings: list[str]


def find_scores(path: Path) -> Path:
    """The file of scores that a path means: itself, or a run folder's `scores.jsonl`.

    Raises:
        PolarError: There is none.
    """
    file = path / SCORES_FILE if path.is_dir() else path
    if not file.is_file():
        where = f"no {SCORES_FILE} in this folder" if path.is_dir() else "no such file"
        raise PolarError(f"{path}: {where}; name a folder that `polar-ft eval` wrote, or a file of scores")
    return file


def read_scores(path: Path, subset_by: Sequence[str] = ()) -> SavedScores:
    """Reads saved scores.

    Args:
        path: A run folder, or a file of JSON lines (.jsonl, .json) or CSV (.csv; .tsv with tabs), also .gz.
        subset_by: Fields whose values pairs are grouped by, in addition to "subset": a name, or a path such
            as "meta.source" or "chosen_info.policy". What is not found in the row itself is looked for in its
            `extra`.

    Raises:
        PolarError: There is no such file, lines cannot be used (each is named with its column), or no line
            has a field of ``subset_by``.
    """
    file = find_scores(path)
    columns = _Columns(file, subset_by)
    for block in read_blocks(file, columns.problem):
        columns.add(block)
        if len(columns.problems) > 10 * _PROBLEMS_SHOWN:
            break
    columns.raise_problems()
    rankings = file.with_name(RANKINGS_FILE)
    has_rankings = file.name == SCORES_FILE and rankings.is_file()
    return columns.finish(list(_read_rankings(rankings, columns.prompt_codes)) if has_rankings else [])


class _Columns:
    """Columns that grow block by block."""

    def __init__(self, file: Path, subset_by: Sequence[str]) -> None:
        self.file = file
        self.problems: list[str] = []
        self.n = 0
        self.prompt_codes: dict[str, int] = {}
        self._floats = {name: array("d") for name in (*_SCORES, *_ROUGE, *_OTHER_SCORES)}
        self._counts = {name: array("q") for name in _COUNTS}
        self._flags = {name: bytearray() for name in ("cut", "reference_is_chosen")}
        self._cut = dict.fromkeys(_CUT_FIELDS, 0)
        self._n_cut_by_field = self._n_same_reference = self._n_shuffled = 0
        self._prompts = array("q")
        self._hashes = array("Q")
        self._ids: list[str] = []
        # dict.fromkeys: once each, "subset" first
        self._groups = {name: _Group(name) for name in dict.fromkeys(("subset", *subset_by))}
        self._asked = set(subset_by)
        self._first_fields: list[str] = []

    def problem(self, line: int, column: str, reason: str) -> None:
        """Notes what is wrong with a line; 0 for the file as a whole."""
        place = f"{self.file}:{line}" if line else str(self.file)
        self.problems.append(": ".join(part for part in (place, column, reason) if part))

    def add(self, block: Block) -> None:
        """Adds the lines of a block to every column."""
        if not self.n:
            self._first_fields = list(block.rows[0])
        for name in _SCORES:
            self._add_numbers(name, block, unknown="error")
        for name in _ROUGE:  # a row without a reference has none
            self._add_numbers(name, block, unknown=math.nan)
        for name in _OTHER_SCORES:
            self._add_numbers(name, block, unknown=None)
        for name in _COUNTS:
            self._add_counts(name, block)
        self._add_flags("cut", block, self._cut_flag)
        self._add_flags("reference_is_chosen", block, _as_flag)
        for shuffled in block.values("shuffled_reference") or ():
            if isinstance(shuffled, dict):
                self._n_shuffled += 1
                self._n_same_reference += shuffled.get("same_reference") is True
        self._add_prompts(block)
        self._hashes.extend(
            [int(value[:16], 16) for value in block.values("input_hash") or () if _is_hash(value)]
        )
        self._add_ids(block)
        for group in self._groups.values():
            group.add(block)
        self.n += len(block.rows)

    def _add_numbers(
        self, name: str, block: Block, unknown: float | Literal["error"] | None = "error"
    ) -> None:
        """Adds a column of numbers; for a line without one ``unknown``, nothing for None."""
        values = block.values(_OTHER_SCORES.get(name, name))
        if values is None:
            if unknown == "error":
                values = [None] * len(block.rows)
            else:
                self._floats[name].extend([] if unknown is None else [unknown] * len(block.rows))
                return
        column = self._floats[name]
        if set(map(type, values)) == {float}:
            column.extend(values)
            return
        for line, row, value in zip(block.numbers, block.rows, values, strict=True):
            number = _as_number(value)
            if number is not None:
                column.append(number)
            elif value is not None:
                self.problem(line, name, f"is {shown(value)} — must be a number")
            elif unknown == "error":
                self.problem(line, name, _missing(row))
            elif unknown is not None:
                column.append(unknown)

    def _add_counts(self, name: str, block: Block) -> None:
        column = self._counts[name]
        for line, value in zip(block.numbers, block.values(name) or (), strict=False):
            if type(value) is int and 0 <= value < _HUGE:
                column.append(value)
            elif value is not None:
                number = _as_number(value)
                if number is None or not number.is_integer() or not 0 <= number < _HUGE:
                    self.problem(line, name, f"is {shown(value)} — must be a whole number, 0 or more")
                else:
                    column.append(int(number))

    def _add_flags(self, name: str, block: Block, convert: Callable[[Any], bool | None]) -> None:
        column = self._flags[name]
        for line, value in zip(block.numbers, block.values(name) or (), strict=False):
            if value is None:
                continue
            flag = convert(value)
            if flag is None:
                self.problem(line, name, f"is {shown(value)} — must be true or false")
            else:
                column.append(flag)

    def _cut_flag(self, value: Any) -> bool | None:
        if not isinstance(value, dict):
            return _as_flag(value)
        self._n_cut_by_field += 1
        cut = [name for name in _CUT_FIELDS if value.get(name)]
        for name in cut:
            self._cut[name] += 1
        return bool(cut)

    def _add_prompts(self, block: Block) -> None:
        codes = self.prompt_codes
        values = block.values("prompt_id")
        if values is None:
            texts = block.values("prompt") or ()
            values = [None if text is None else prompt_id(str(text)) for text in texts]
        self._prompts.extend(
            [codes.setdefault(str(value), len(codes)) for value in values if value is not None]
        )

    def _add_ids(self, block: Block) -> None:
        values = block.values("id") or []
        pairs = block.values("pair")
        if pairs is None:
            self._ids.extend([str(value) for value in values if value is not None])
            return
        # A ranked row has several pairs, and an id must name one.
        for name, pair in zip(values, pairs, strict=False):
            if name is not None:
                own = not isinstance(pair, list) or len(pair) != 2 or pair == [0, 1]
                self._ids.append(str(name) if own else f"{name} ({pair[0]}>{pair[1]})")

    def raise_problems(self) -> None:
        """Raises a `DataError` that names the first lines that cannot be used; nothing without any."""
        if not self.problems and not self.n:
            self.problem(0, "", "has no lines — an empty file is no scores; check the path")
        if not self.problems:
            return
        shown = "\n".join(f"  {problem}" for problem in self.problems[:_PROBLEMS_SHOWN])
        rest = len(self.problems) - _PROBLEMS_SHOWN
        more = (
            f"\n  … and {'at least ' if rest > 9 * _PROBLEMS_SHOWN else ''}{rest:,} more" if rest > 0 else ""
        )
        raise DataError(f"the scores cannot be used:\n{shown}{more}", self.problems)

    def finish(self, rankings: list[Ranking]) -> SavedScores:
        """The columns that all lines have, as arrays."""
        warnings: list[str] = []
        partly: dict[str, int] = {}

        def whole(name: str, values: Any) -> Any:
            if len(values) == self.n:
                return values
            if len(values):
                partly[name] = self.n - len(values)
            return None

        def numbers(name: str) -> NDArray[np.float64] | None:
            values = whole(name, self._floats[name])
            return None if values is None else np.frombuffer(values, dtype=np.float64)

        counts: dict[str, Any] = {
            name: None if (values := whole(name, column)) is None else np.frombuffer(values, dtype=np.int64)
            for name, column in self._counts.items()
        }
        flags: dict[str, Any] = {
            name: None if (values := whole(name, column)) is None else np.frombuffer(values, dtype=np.bool_)
            for name, column in self._flags.items()
        }
        prompts = whole("prompt_id", self._prompts)
        ids = whole("id", self._ids)
        subsets = {}
        for name, group in self._groups.items():
            categories = group.finish(self.file, self._first_fields, needed=name in self._asked)
            if categories is not None:
                subsets[name] = categories
        chosen, rejected = numbers("chosen_score"), numbers("rejected_score")
        assert chosen is not None, "raise_problems() was called"
        assert rejected is not None, "raise_problems() was called"
        others: dict[str, Any] = {name: numbers(name) for name in (*_ROUGE, *_OTHER_SCORES)}
        for name in _ROUGE:  # NaN for a row without a reference; for all of them it is no column
            values = others[name]
            others[name] = None if values is None or np.isnan(values).all() else values
        for name, missing in partly.items():
            warnings.append(
                f"{self.file}: {name} is missing in {missing:,} of {self.n:,} lines, so it is left out with "
                f"the figures that need it."
            )
        hashes = np.frombuffer(self._hashes, dtype=np.uint64) if len(self._hashes) == self.n else None
        table = PairTable(
            chosen_score=chosen,
            rejected_score=rejected,
            ids=ids,
            subsets=subsets,
            prompts=None if prompts is None else np.frombuffer(prompts, dtype=np.int64),
            **counts,
            **flags,
            **others,
        )
        return SavedScores(
            table=table,
            rankings=rankings,
            cut=self._cut if self._n_cut_by_field == self.n else None,
            input_hashes=hashes,
            n_same_reference=self._n_same_reference if self._n_shuffled == self.n else None,
            warnings=warnings,
        )


@dataclass
class _Group:
    """Values of one field of ``subset_by``."""

    name: str
    codes: array[int] = field(default_factory=lambda: array("i"))
    names: dict[str, int] = field(default_factory=dict)
    n_found: int = 0

    def add(self, block: Block) -> None:
        """Adds the lines of a block."""
        values, names = block.values(self.name), self.names
        if "extra" in block.fields:
            get = getter(self.name)
            known = values or [None] * len(block.rows)
            values = [
                get(row["extra"]) if value is None and isinstance(row.get("extra"), dict) else value
                for value, row in zip(known, block.rows, strict=True)
            ]
        none = f"(no {self.name})"
        if values is None:
            values = [None] * len(block.rows)
        self.n_found += len(values) - values.count(None)
        texts = [
            value if type(value) is str else none if value is None else json.dumps(value, ensure_ascii=False)
            for value in values
        ]
        self.codes.extend([names.setdefault(text, len(names)) for text in texts])
        if len(names) > MAX_CATEGORIES:
            raise PolarError(
                f"the field {self.name} has more than {MAX_CATEGORIES} different values; name one "
                f"that names parts of the data, not rows"
            )

    def finish(self, file: Path, fields: Sequence[str], needed: bool) -> Categories | None:
        if not self.n_found:
            if needed:
                raise PolarError(
                    f"{file}: no line has the field {self.name!r} of --subset-by; the fields of the first "
                    f"line are {', '.join(fields)}"
                )
            return None
        ordered = sorted(self.names)
        rank = {name: number for number, name in enumerate(ordered)}
        recode = np.array([rank[name] for name in self.names], dtype=np.int32)
        return Categories(ordered, recode[np.frombuffer(self.codes, dtype=np.intc)])


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


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) >= 16 and not set(value[:16]) - set("0123456789abcdef")


def _as_flag(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    return {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())


def _missing(row: Mapping[str, Any]) -> str:
    others = ", ".join(list(row)[:8]) or "nothing"
    return f"is missing — the line has {others}{', …' if len(row) > 8 else ''}; rename the column or add it"


def _read_rankings(file: Path, prompt_codes: dict[str, int]) -> Iterator[Ranking]:
    def stop(line: int, column: str, reason: str) -> None:
        raise PolarError(f"{file}:{line}: {reason}")

    blocks = read_blocks(file, stop)
    for number, row in (line for block in blocks for line in zip(block.numbers, block.rows, strict=True)):
        try:
            candidates = row["candidates"]
            yield Ranking(
                id=str(row["id"]),
                subset=row["subset"],
                prompt=prompt_codes.setdefault(row["prompt_id"], len(prompt_codes)),
                model_scores=np.array([float(each["score"]) for each in candidates]),
                given=np.array([float(each["given"]) for each in candidates]),
                info=[each["info"] for each in candidates],
                benchmark=row.get("benchmark"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PolarError(
                f"{file}:{number}: is no ranked row of `polar-ft eval` ({type(error).__name__}: {error}); "
                f"remove the file to leave the ranking figures out"
            ) from error
