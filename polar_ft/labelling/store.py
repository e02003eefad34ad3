"""The folder of decisions: a file of rows for each labeller.

    labels/alice.jsonl                    decisions of alice, as rows that training reads: pairs, and ties as
                                          ranked rows of two equal answers, which give no pair
    labels/repeats_and_skips/alice.jsonl  her second looks at a pair, and the pairs she skipped, in the same
                                          form: for the report, as readers of the folder leave it out

A decision is a line, which is on the disk before the next pair is shown; undo cuts off the last line. The
files are all there is: a new start reads them and continues.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from polar_ft.data.writing import to_line
from polar_ft.errors import PolarError
from polar_ft.files import lock_file
from polar_ft.labelling.decisions import OTHER_FOLDER, Choice, Decision, decisions_in, row_of
from polar_ft.labelling.pairs import Pair, digest

# A pair is shown again after so many other decisions, or when nothing else is left.
REPEAT_AFTER = 10


def clean_name(name: str) -> str:
    """The name of a labeller, which is also that of a file; capitals do not count.

    Raises:
        PolarError: It cannot be used.

    >>> clean_name(" Alice-2 ")
    'alice-2'
    """
    cleaned = unicodedata.normalize("NFC", name.strip().lower())
    # Vowel signs of many scripts are marks, which \w of a regular expression leaves out.
    usable = all(one.isalnum() or one in "_-" or unicodedata.category(one)[0] == "M" for one in cleaned)
    if not (usable and cleaned[:1].isalnum() and len(cleaned) <= 40):
        raise PolarError("a name has 1 to 40 letters, digits, _ or -, and begins with a letter or digit")
    return cleaned


class ChangedError(PolarError):
    """The labeller has decided elsewhere in the meantime."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What a labeller sees next: a pair, which answer is on the left, and whether it was seen before."""

    pair: Pair
    left: int
    repeat: bool


class Labeller:
    """One labeller: decisions in their order, and the two files.

    Args:
        folder: The folder of decisions.
        name: The name, as `clean_name` gives it.
        pairs: All pairs by key, in the order in which they are shown.
        repeat: Share of the pairs that are shown again, sides swapped.

    Raises:
        PolarError: A file is damaged.
    """

    def __init__(self, folder: Path, name: str, pairs: Mapping[str, Pair], repeat: float) -> None:
        self.name = name
        self.pairs = pairs
        self._again = {key for key in pairs if _uniform("repeat", self.name, key) < repeat}
        self._files = folder / f"{self.name}.jsonl", folder / OTHER_FOLDER / f"{self.name}.jsonl"
        for file in self._files:
            _mend_last_line(file)
        existing = [file for file in self._files if file.is_file() and file.stat().st_size]
        decisions = [decision for file in existing for decision in decisions_in(file)]
        self.decisions = sorted(decisions, key=lambda decision: decision.number)

    def next(self) -> Shown | None:
        """The pair to show; None when all is done."""
        first = {one.pair: one for one in self.decisions if not one.repeat}
        repeated = {one.pair for one in self.decisions if one.repeat}
        due = (
            one
            for key, one in first.items()
            # Without a side (rows of another tool) there is none to swap.
            if key in self._again and key not in repeated and one.choice != "skip" and one.left is not None
        )
        again = next(due, None)
        fresh = next((pair for key, pair in self.pairs.items() if key not in first), None)
        if again is not None and (fresh is None or len(self.decisions) - again.number >= REPEAT_AFTER):
            assert again.left is not None
            return Shown(self.pairs[again.pair], 1 - again.left, True)
        if fresh is None:
            return None
        return Shown(fresh, int(_uniform("left", self.name, fresh.key) < 0.5), False)

    @property
    def progress(self) -> tuple[int, int]:
        """Number of pairs shown of those in the input, and of all that will be, second looks included."""
        mine = [one for one in self.decisions if one.pair in self.pairs]
        repeated = {one.pair for one in mine if one.repeat}
        never = {one.pair for one in mine if not one.repeat and (one.choice == "skip" or one.left is None)}
        return len(mine), len(self.pairs) + len((self._again - never) | repeated)

    def decide(self, number: int, key: str, choice: Choice, seconds: float) -> None:
        """Writes a decision on the pair that was shown, to the disk.

        Args:
            number: Number of decisions that the page knew of.
            key: The pair that the page showed.
            choice: The decision.
            seconds: How long it took.

        Raises:
            ChangedError: It is not the pair that is due: the labeller is at work in another window, too.
            PolarError: It cannot be written; nothing of it is on the disk.
        """
        shown = self.next()
        if shown is None or number != len(self.decisions) or key != shown.pair.key:
            raise ChangedError(
                "decisions of this name were made in another window; the page shows what is next"
            )
        winner = {"left": shown.left, "right": 1 - shown.left}.get(choice)
        decision = Decision(
            self.name, key, winner, shown.left, choice, shown.repeat, number + 1, round(seconds, 1)
        )
        _append(self._file_of(decision), to_line(row_of(shown.pair, decision)))
        self.decisions.append(decision)

    def undo(self, number: int) -> None:
        """Removes the last decision from the disk; its pair is due again.

        Raises:
            ChangedError: As in `decide`.
            PolarError: There is none, or its pair is not in the input.
        """
        if number != len(self.decisions):
            raise ChangedError(
                "decisions of this name were made in another window; the page shows what is next"
            )
        if not self.decisions:
            raise PolarError("there is nothing to undo")
        last = self.decisions[-1]
        if last.pair not in self.pairs:
            raise PolarError("the last decision was on a pair that is not in the input; it stays as it is")
        _cut_last_line(self._file_of(last))
        self.decisions.pop()

    def _file_of(self, decision: Decision) -> Path:
        return self._files[decision.repeat or decision.choice == "skip"]


class Store:
    """All labellers of a folder, which belongs to one process.

    Args:
        folder: The folder; created where it is missing.
        pairs: The pairs, in the order in which they are shown.
        repeat: Share of the pairs that a labeller sees twice.

    Raises:
        PolarError: Another process has the folder, it holds other files, or cannot be written.
    """

    def __init__(self, folder: Path, pairs: Iterable[Pair], repeat: float) -> None:
        self.folder = folder
        self.repeat = repeat
        self.pairs = {pair.key: pair for pair in pairs}
        try:
            (folder / OTHER_FOLDER).mkdir(parents=True, exist_ok=True)
            self._lock = lock_file(
                folder / OTHER_FOLDER / ".lock",
                f"{folder}: another polar-ft label writes to this folder; end it, or name another --out",
            )
        except OSError as error:
            raise PolarError(f"{folder}: cannot be written ({error.strerror}); name another --out") from error
        names = {file.stem for file in [*folder.glob("*.jsonl"), *(folder / OTHER_FOLDER).glob("*.jsonl")]}
        self.labellers: dict[str, Labeller] = {}
        for name in sorted(names):
            if clean_name(name) != name:
                raise PolarError(f"{folder}: {name}.jsonl is no name of a labeller; use small letters")
            self.labeller(name)

    def labeller(self, name: str) -> Labeller:
        """The labeller of a name; a new one has no file yet.

        Raises:
            PolarError: The name cannot be used.
        """
        name = clean_name(name)
        if name not in self.labellers:
            self.labellers[name] = Labeller(self.folder, name, self.pairs, self.repeat)
        return self.labellers[name]

    def close(self) -> None:
        """Lets other processes have the folder."""
        self._lock.close()


def _append(file: Path, line: bytes) -> None:
    """Writes a line to the end of a file and the disk; if that fails, the file is as before."""
    new = not file.exists()
    size = 0 if new else file.stat().st_size
    try:
        with file.open("ab") as stream:
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())
        if new:
            _sync_folder(file.parent)
    except OSError as error:
        with suppress(OSError):
            os.truncate(file, size)
        raise PolarError(f"{file.name}: cannot be written ({error.strerror}); free some space") from error


def _cut_last_line(file: Path) -> None:
    content = file.read_bytes()
    _cut(file, content.rfind(b"\n", 0, len(content) - 1) + 1)


def _mend_last_line(file: Path) -> None:
    """Completes or removes a line that a crash left without its end; a file of other rows is left alone."""
    content = file.read_bytes() if file.is_file() else b""
    size = content.rfind(b"\n") + 1
    last = content[size:]
    begins_like_ours = last[:7] == b'{"id": '[: len(last)]
    if not (last and begins_like_ours and all(b'"labeller": ' in one for one in content[:size].splitlines())):
        return
    try:
        is_decision = "labeller" in json.loads(last)
    except ValueError:
        _cut(file, size)  # it was never confirmed to the labeller
        return
    if is_decision:
        _append(file, b"\n")


def _cut(file: Path, size: int) -> None:
    """Shortens a file on the disk; an empty one is removed, as readers of data take it for a mistake."""
    try:
        if not size:
            file.unlink()
            _sync_folder(file.parent)
            return
        with file.open("r+b") as stream:
            stream.truncate(size)
            os.fsync(stream.fileno())
    except OSError as error:
        raise PolarError(f"{file.name}: cannot be written ({error.strerror})") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _uniform(*texts: str) -> float:
    """A number from [0, 1) that looks random and is always the same for the same texts."""
    return int(digest(*texts)[:12], 16) / 16**12
