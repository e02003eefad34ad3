"""The journal of a scoring run: rewards as they come, so that a killed run resumes.

A file of JSON lines next to the output. The first line identifies the run, each further line has the rewards
of some rows::

    {"version": 1, "rows": 5000, "data": "9f2c…", "template": "03ab…", "scale": false, "known": [-0.5, …]}
    {"rewards": [[17, [-0.5, -11.0]], [18, [-3.25, -4.0]]], "cut": 0}

Rows come nearly in order, since few are in progress at a time. So memory does not grow with the number of
rows, neither for resuming nor for putting the rewards in order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from polar_ft.errors import PolarError

Rewards = Sequence[tuple[int, Sequence[float]]]

# The model's scores of the known inputs are never exactly equal, so whoever opens a journal compares them.
NOT_COMPARED = "known"


class DoneRows:
    """Numbers of the rows that are scored; only those after a gap take memory.

    >>> done = DoneRows()
    >>> for number in (0, 2, 1, 4):
    ...     done.add(number)
    >>> [number for number in range(6) if number not in done], len(done)
    ([3, 5], 4)
    """

    def __init__(self) -> None:
        self._next = 0
        self._ahead: set[int] = set()

    def add(self, number: int) -> None:
        """Notes that the row is scored."""
        self._ahead.add(number)
        while self._next in self._ahead:
            self._ahead.remove(self._next)
            self._next += 1

    def __contains__(self, number: int) -> bool:
        return number < self._next or number in self._ahead

    def __len__(self) -> int:
        return self._next + len(self._ahead)


class RewardJournal:
    """An open journal; made by `open_journal`.

    Attributes:
        path: The file.
        header: What identifies the run, as first written.
        done: Rows whose rewards are in it.
        n_cut: Rows of which something was cut.
    """

    def __init__(self, path: Path, stream: Any) -> None:
        self.path = path
        self.header: Mapping[str, Any] = {}
        self.done = DoneRows()
        self.n_cut = 0
        self._stream = stream

    def add(self, rewards: Rewards, n_cut: int = 0) -> None:
        """Writes the rewards of some rows.

        Args:
            rewards: For each row its number and the rewards of its candidates.
            n_cut: Number of these rows of which something was cut.

        Raises:
            PolarError: The disk is full or fails.
        """
        self._write({"rewards": rewards, "cut": n_cut})
        self._count(rewards, n_cut)

    def in_order(self) -> Iterator[Sequence[float]]:
        """The rewards of row 0, 1, 2, …, read from the file."""
        waiting: dict[int, Sequence[float]] = {}
        number = 0
        with self.path.open("rb") as stream:
            next(stream)
            for line in stream:
                waiting.update((n, rewards) for n, rewards in json.loads(line)["rewards"])
                while number in waiting:
                    yield waiting.pop(number)
                    number += 1

    def begin_or_resume(self, header: Mapping[str, Any]) -> None:
        """Reads what an earlier run left, or begins a new journal.

        Raises:
            PolarError: The journal belongs to another run.
        """
        self._stream.seek(0)
        complete = 0  # bytes of complete lines
        for line in self._stream:
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if entry is None or not line.endswith(b"\n"):
                break  # the run was killed while it wrote this
            if complete == 0:
                self._check(entry, header)
                self.header = entry
            else:
                self._count(entry["rewards"], entry["cut"])
            complete += len(line)
        self._stream.seek(complete)
        self._stream.truncate()
        if complete == 0:
            self._write(header)
            self.header = header

    def _check(self, found: Mapping[str, Any], header: Mapping[str, Any]) -> None:
        different = [key for key in header if key != NOT_COMPARED and found.get(key) != header[key]]
        if different:
            raise another_run(self.path, " and another ".join(different))

    def _count(self, rewards: Rewards, n_cut: int) -> None:
        for number, _ in rewards:
            self.done.add(number)
        self.n_cut += n_cut

    def _write(self, entry: Mapping[str, Any]) -> None:
        try:
            self._stream.write(json.dumps(entry).encode() + b"\n")
            # Handed to the operating system, so that it outlives the process.
            self._stream.flush()
        except OSError as error:
            raise PolarError(
                f"{self.path}: cannot be written ({error.strerror or error}); free some space and give the "
                f"same command again, it resumes from here"
            ) from error


@contextmanager
def open_journal(path: Path, header: Mapping[str, Any], *, restart: bool) -> Iterator[RewardJournal]:
    """Opens the journal of a run, with what an earlier run left in it.

    Args:
        path: The file; its folder is created where it is missing.
        header: What identifies the run, so that the rewards of another run are not taken for its own.
        restart: Discard what an earlier run left.

    Raises:
        PolarError: Another process writes it, it belongs to another run, or it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a+b")
    except OSError as error:
        reason = error.strerror or error
        raise PolarError(f"{path}: cannot be written ({reason}); name another output") from error
    with stream:
        _lock(stream, path)
        if restart:
            stream.truncate(0)
        journal = RewardJournal(path, stream)
        journal.begin_or_resume(header)
        yield journal


def _lock(stream: Any, path: Path) -> None:
    with suppress(ImportError):  # Windows has no fcntl
        import fcntl

        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise PolarError(f"{path}: another run is writing it; wait for it, or stop it") from error


def another_run(path: Path, what: str) -> PolarError:
    """The error for a journal of a run that differs in ``what``."""
    return PolarError(
        f"{path}: is of a run with another {what}; give --restart to score everything again, or name another "
        f"output"
    )


def remove(path: Path) -> None:
    """Removes a journal that is no longer needed."""
    with suppress(OSError):
        os.unlink(path)
