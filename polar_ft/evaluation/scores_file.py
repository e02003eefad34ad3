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

import gzip
import math
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import from_json

from polar_ft.data.problems import PROBLEMS_SHOWN, RowProblem, raise_problems
from polar_ft.data.reading import expand, read_rows
from polar_ft.data.records import RowError
from polar_ft.errors import PolarError
from polar_ft.evaluation.pairs import PairTable, Ranking
from polar_ft.evaluation.score_columns import Block, Column, Row, SubsetField, as_flag
from polar_ft.evaluation.score_forms import Form, by_rows, find_form
from polar_ft.evaluation.scores import RANKINGS_FILE, SCORES_FILE, content_hash, prompt_id

_BLOCK = 8192  # rows that become columns at once

_ROUGE = ("chosen_rouge", "rejected_rouge")
_CUT_FIELDS = ("prompt", "reference", "chosen", "rejected")


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
    try:
        expand(str(path))
    except PolarError as error:
        if not path.is_dir():
            raise
        raise PolarError(
            f"{path}: no {SCORES_FILE} in this folder; name a folder that `polar-ft eval` wrote, or a file "
            f"of scores"
        ) from error
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
        if len(reader.problems) > 10 * PROBLEMS_SHOWN:
            break
    raise_problems(reader.problems)
    ranked = file.with_name(RANKINGS_FILE)
    if file.name == SCORES_FILE and ranked.is_file():
        for place, row in _rows(ranked):
            reader.add_ranked(place, row)
        raise_problems(reader.problems)
    return reader.finish()


class _Reader:
    """The columns of a file, growing block by block."""

    def __init__(self, file: Path, subset_by: Sequence[str]) -> None:
        self.file = file
        self.problems: list[RowProblem] = []
        self.n = 0
        self._form: Form | None = None
        self._prompt_codes: dict[str, int] = {}
        self._rankings: list[Ranking] = []
        columns = [
            Column("chosen_score", "d", needed=True),
            Column("rejected_score", "d", needed=True),
            *(Column(name, "d", fill=math.nan) for name in _ROUGE),  # a row without a reference has none
            *(
                Column(f"{kind}_{role}", "d", path=f"{kind}_reference.{role}_score")
                for kind in ("shuffled", "empty")
                for role in ("chosen", "rejected")
            ),
            *(
                Column(f"{role}_{unit}", "q")
                for unit in ("chars", "tokens")
                for role in ("chosen", "rejected")
            ),
            Column("cut", "b"),
            Column("reference_is_chosen", "b"),
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
        self._subsets = [SubsetField(name) for name in dict.fromkeys(("subset", *subset_by))]
        self._asked = set(subset_by)
        self._first_fields: list[str] = []

    def problem(self, place: str, column: str, reason: str) -> None:
        """Notes what is wrong with a row."""
        self.problems.append(RowProblem.at(place, RowError(column, reason)))

    def read(self, rows: Sequence[tuple[str, Row | RowProblem]]) -> None:
        """Takes rows apart into pairs and adds these to every column."""
        places, pairs = [], []
        for place, row in rows:
            if isinstance(row, RowProblem):
                self.problems.append(row)
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
            return as_flag(value)
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

    def add_ranked(self, place: str, row: Row | RowProblem) -> None:
        """Adds a row of `rankings.jsonl`."""
        codes = self._prompt_codes
        if isinstance(row, RowProblem):
            self.problems.append(row)
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


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) >= 16 and not set(value[:16]) - set("0123456789abcdef")


def _rows(file: Path) -> Iterator[tuple[str, Row | RowProblem]]:
    """The rows of a file or folder, also of an object whose values are columns."""
    name = file.name.lower()
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
