"""Scores a data set of any size; memory does not grow with the number of rows.

Three passes over the data: first every row is checked; then rows are scored, and their rewards go into a
journal as they arrive; last the output is written in the order of the data, and appears when it is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polar_ft.client.bulk.journal import RewardJournal, another_run, open_journal, remove
from polar_ft.client.bulk.rows import RowToScore, parse_row_to_score, with_rewards
from polar_ft.client.client import RewardModelClient
from polar_ft.client.contact import check_same_model
from polar_ft.client.errors import RewardServerError
from polar_ft.data.reading import DataSource, RowProblem, raise_problems
from polar_ft.data.records import RowError
from polar_ft.data.writing import open_rows
from polar_ft.errors import PolarError
from polar_ft.groups import TokenGroup
from polar_ft.template import EncodeError, PolarTemplate

# Rows that go to the client together: about one request, so that the estimate of the time left is stable.
BATCH_CHARS = 100_000
BATCH_ROWS = 64

# After so many bad rows the rest of the data is not read.
MOST_PROBLEMS = 1000

# Called with the progress: phase, characters done, characters in all (None where not known).
Show = Callable[[str, int, int | None], None]

# Rewards of each row of a batch, [rows][candidates].
Rewards = list[list[float]]


@dataclass(frozen=True)
class Contents:
    """What `check_rows` found in a data set.

    Attributes:
        n_rows: Number of rows.
        n_chars: Number of characters that are sent, a measure of the work.
        digest: A hash of everything that is scored, in order.
    """

    n_rows: int
    n_chars: int
    digest: str


@dataclass(frozen=True)
class Result:
    """Counts of a run.

    Attributes:
        n_rows: Rows of the output.
        n_resumed: Rows that an earlier run had scored.
        n_cut: Rows of which something was cut.
    """

    n_rows: int
    n_resumed: int
    n_cut: int


def score_data_set(
    client: RewardModelClient,
    data: DataSource,
    out: Path,
    *,
    batches_under_way: int,
    restart: bool = False,
    scaled: bool = False,
    show: Show = lambda *_: None,
) -> Result:
    """Scores every row and writes it with its rewards.

    After a failure, or if the process is killed, the same call resumes: inputs with rewards are not sent
    again.

    Args:
        client: Gives the rewards.
        data: The rows.
        out: A .jsonl or .jsonl.gz file; appears at the end, complete.
        batches_under_way: Batches of rows that are held in memory at a time.
        restart: Score everything again, whatever an earlier run left.
        scaled: Whether the client applies the reward scale; runs with and without it are different runs.
        show: Called with the progress.

    Raises:
        DataError: Rows cannot be used; nothing was scored.
        PolarError: A row does not fit the model's limits, a server failed, or a file cannot be written.
    """
    contents = check_rows(data, show)
    known = next(profile.probe_scores for profile in client.servers() if profile is not None)
    header = {
        "version": 1,
        "rows": contents.n_rows,
        "data": contents.digest,
        "template": client.template.fingerprint,
        "scale": scaled,
        "known": known,
    }
    journal_path = out.with_name(f".{out.name}.journal")
    with open_journal(journal_path, header, restart=restart) as journal:
        _check_model(journal, known)
        n_resumed = len(journal.done)
        try:
            _score_missing(client, data, journal, contents, batches_under_way, show)
        except PolarError as error:
            kept = f"{len(journal.done):,} of {contents.n_rows:,} rows are scored and kept"
            raise PolarError(f"{error}\n{kept}; the same command resumes from there") from error
        _write(data, journal, out, contents, show)
        remove(journal_path)
        return Result(contents.n_rows, n_resumed, journal.n_cut)


def _check_model(journal: RewardJournal, scores: Sequence[float]) -> None:
    """Checks that the rewards in the journal came from the model that answers now."""
    before = journal.header.get("known") or scores
    if scores:  # none with check_raw=False
        try:
            check_same_model("", scores, "", before)
        except RewardServerError:
            raise another_run(journal.path, "model (it scores the known inputs otherwise)") from None


def check_rows(data: DataSource, show: Show) -> Contents:
    """Checks every row, so that a long run does not fail at a bad row near its end.

    Raises:
        DataError: Rows cannot be used; the message names the first of them.
    """
    problems: list[RowProblem] = []
    digest = hashlib.blake2b(digest_size=16)
    n_rows = n_chars = 0
    for place, row in data.rows():
        try:
            if isinstance(row, RowProblem):
                problems.append(row)
            else:
                asked = parse_row_to_score(row)
                _update(digest, asked)
                n_rows += 1
                n_chars += asked.chars
                show("checking", n_chars, None)
        except RowError as error:
            problems.append(RowProblem.at(place, error))
        if len(problems) >= MOST_PROBLEMS:
            break
    raise_problems(problems)
    return Contents(n_rows, n_chars, digest.hexdigest())


def _rows_again(data: DataSource) -> Iterator[tuple[str, dict[str, Any], RowToScore]]:
    """The rows, all of which were good when they were checked, with their places."""
    for place, row in data.rows():
        if isinstance(row, RowProblem):
            raise _changed(str(row))
        try:
            asked = parse_row_to_score(row)
        except RowError as error:
            raise _changed(f"{place}: {error}") from None
        yield place, row, asked


def _changed(where: str) -> PolarError:
    return PolarError(f"{where}; the data changed during the run: give --restart to score it again")


@dataclass
class _Batch:
    """Rows that are scored together, each with its number and place."""

    rows: list[tuple[int, str, RowToScore]] = field(default_factory=list)
    chars: int = 0
    n_cut: int = 0

    def add(self, number: int, place: str, asked: RowToScore) -> None:
        self.rows.append((number, place, asked))
        self.chars += asked.chars

    @property
    def is_full(self) -> bool:
        return self.chars >= BATCH_CHARS or len(self.rows) >= BATCH_ROWS

    def note(self, rewards: Rewards, journal: RewardJournal) -> None:
        numbers = [number for number, _, _ in self.rows]
        journal.add(list(zip(numbers, rewards, strict=True)), self.n_cut)


def _score_missing(
    client: RewardModelClient,
    data: DataSource,
    journal: RewardJournal,
    contents: Contents,
    batches_under_way: int,
    show: Show,
) -> None:
    """Scores the rows that the journal lacks; keeps the rewards that arrived, also where it fails."""
    under_way: dict[Future[Rewards], _Batch] = {}
    done = 0

    def keep_first() -> None:
        nonlocal done
        for future in wait(under_way, return_when=FIRST_COMPLETED).done:
            batch = under_way.pop(future)
            batch.note(future.result(), journal)
            done += batch.chars
        show("scoring", done, contents.n_chars)

    try:
        for batch in _batches(data, journal):
            if isinstance(batch, int):  # characters that an earlier run has scored
                done += batch
                continue
            encoded = _encode(client.template, batch)
            under_way[client.submit_encoded(encoded)] = batch
            if len(under_way) >= batches_under_way:
                keep_first()
        while under_way:
            keep_first()
    except BaseException:
        _keep_finished(under_way, journal)
        raise


def _batches(data: DataSource, journal: RewardJournal) -> Iterator[_Batch | int]:
    """Batches of the rows that the journal lacks, and the characters of each row that it has."""
    batch = _Batch()
    for number, (place, _, asked) in enumerate(_rows_again(data)):
        if number in journal.done:
            yield asked.chars
            continue
        batch.add(number, place, asked)
        if batch.is_full:
            yield batch
            batch = _Batch()
    if batch.rows:
        yield batch


def _encode(template: PolarTemplate, batch: _Batch) -> list[TokenGroup]:
    try:
        encoded = template.encode([asked.group for _, _, asked in batch.rows])
    except EncodeError as error:
        _, place, _ = batch.rows[error.index]
        raise PolarError(f"{place}: {error}") from None
    batch.n_cut = sum(bool(group.cut) for group in encoded)
    return encoded


def _keep_finished(under_way: Mapping[Future[Rewards], _Batch], journal: RewardJournal) -> None:
    """Notes the batches that are finished and stops the others."""
    for future, batch in under_way.items():
        if not future.cancel() and future.done() and not future.cancelled() and future.exception() is None:
            batch.note(future.result(), journal)


def _write(data: DataSource, journal: RewardJournal, out: Path, contents: Contents, show: Show) -> None:
    digest = hashlib.blake2b(digest_size=16)
    done = 0
    with open_rows(out) as writer:
        in_order = journal.in_order()
        for _, row, asked in _rows_again(data):
            rewards = next(in_order, None)
            if rewards is None or len(rewards) != len(asked.group.candidates):
                raise _changed(data.path)
            _update(digest, asked)
            writer.write(with_rewards(row, asked, rewards))
            done += asked.chars
            show("writing", done, contents.n_chars)
        if digest.hexdigest() != contents.digest:
            raise _changed(data.path)


def _update(digest: Any, asked: RowToScore) -> None:
    group = asked.group
    digest.update(json.dumps([group.prompt, group.reference, group.candidates, group.wrapper]).encode())
