"""`scores.jsonl` and `rankings.jsonl` as they grow: a run that was broken off goes on where it was."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from polar_ft.data.records import Example
from polar_ft.errors import PolarError
from polar_ft.evaluation.scores import RANKINGS_FILE, SCORES_FILE, RankedScores, ScoredPair, to_json_line


class ScoreJournal:
    """The lines of a run's rows, on disk as soon as they are scored.

    A row counts as done when all its lines are there with its `score_key`. Lines are appended in the order of
    scoring; `finish` brings them into the order of the data. A line that was being written when the run was
    broken off is dropped, and so are, at the end, lines of another run.

    Args:
        folder: Where the files lie; must exist.
        examples: All rows of the run.
        keys: The `score_key` of each row.

    Raises:
        PolarError: The files cannot be read or written, or another run is writing them.
    """

    def __init__(self, folder: Path, examples: Sequence[Example], keys: Sequence[str]) -> None:
        self._keys = keys
        self._pairs_of = {key: example.pairs for key, example in zip(keys, examples, strict=True)}
        self._ranked = {key for key, example in zip(keys, examples, strict=True) if example.candidate_info}
        self._folder = folder
        with _disk_errors(folder):
            self._pairs = _GrowingFile(folder / SCORES_FILE, self._pairs_of)
            self._rankings = _GrowingFile(folder / RANKINGS_FILE, self._ranked)
        self._begins_anew = not any(map(self.is_done, self._pairs_of))

    def __enter__(self) -> ScoreJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pairs.close()
        self._rankings.close()

    def is_done(self, key: str) -> bool:
        """Whether all lines of a row are there."""
        lines = self._pairs.spans.get(key, {})
        if not all(pair in lines for pair in self._pairs_of[key]):
            return False
        return key not in self._ranked or key in self._rankings.spans

    def scores_of(self, key: str, pair: tuple[int, int]) -> tuple[float, float]:
        """(chosen, rejected) rewards of a pair of a row that is done."""
        line = json.loads(self._pairs.read(key, pair))
        return float(line["chosen_score"]), float(line["rejected_score"])  # "NaN" is read as the number

    def append(self, rows: Iterable[ScoredPair | RankedScores]) -> None:
        """Writes the lines of rows that have been scored, and hands them to the system before it returns."""
        with _disk_errors(self._folder):
            if self._begins_anew:
                # Not before there is a line to put in its place: an earlier result is still whole.
                self._pairs.clear()
                self._rankings.clear()
                self._begins_anew = False
            for row in rows:
                file = self._pairs if isinstance(row, ScoredPair) else self._rankings
                file.append(row.score_key, row.pair if isinstance(row, ScoredPair) else (), to_json_line(row))
            self._rankings.flush()
            self._pairs.flush()

    def finish(self) -> None:
        """Brings the lines of both files into the order of the data; each is replaced whole."""
        with _disk_errors(self._folder):
            self._pairs.sort([(key, pair) for key in self._keys for pair in self._pairs_of[key]])
            self._rankings.sort([(key, ()) for key in self._keys if key in self._ranked])


class _GrowingFile:
    """One file and where in it the lines of each row are: key → pair → (start, length) in bytes."""

    def __init__(self, path: Path, keys: Iterable[str]) -> None:
        self.path = path
        self.spans: dict[str, dict[tuple[int, ...], tuple[int, int]]] = {}
        known = set(keys)
        self._file: BinaryIO = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise PolarError(
                f"{path}: another run is writing it; wait for it, or name another folder with --out"
            ) from None
        self._file.seek(0)
        self._end = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            self._note(line, known)
            self._end += len(line)
        self._file.truncate(self._end)

    def _note(self, line: bytes, known: set[str]) -> None:
        try:
            row = json.loads(line)
            key, pair = row["score_key"], tuple(row.get("pair", ()))
        except (ValueError, TypeError, KeyError, AttributeError):
            return  # no line of ours
        if key in known:
            self.spans.setdefault(key, {})[pair] = (self._end, len(line))

    def append(self, key: str, pair: tuple[int, ...], line: bytes) -> None:
        self._file.write(line)
        self.spans.setdefault(key, {})[pair] = (self._end, len(line))
        self._end += len(line)

    def read(self, key: str, pair: tuple[int, ...]) -> bytes:
        start, length = self.spans[key][pair]
        self._file.seek(start)
        return self._file.read(length)

    def flush(self) -> None:
        self._file.flush()

    def clear(self) -> None:
        self._file.truncate(0)
        self._end = 0
        self.spans.clear()

    def sort(self, order: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        self.flush()
        ordered = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            with ordered.open("wb") as target:
                for key, pair in order:
                    target.write(self.read(key, pair))
            ordered.replace(self.path)
        finally:
            ordered.unlink(missing_ok=True)
        if not order:  # no ranked row: no file
            self.path.unlink()

    def close(self) -> None:
        with suppress(OSError):  # flushes once more, onto a disk that may be full
            self._file.close()


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PolarError(
            f"{folder}: the scores could not be written ({error.strerror or error}); make room or name "
            f"another folder with --out. The same command goes on with what was scored"
        ) from error
