"""The steps of a fit: shown, kept in ``fit.json``, and not repeated while their input is the same.

A step is known by a hash of its inputs: settings, and the content of the files that it reads. So a fit that
was killed resumes with the same command, and a change repeats the steps that depend on it and no others::

    fit.json   {"done":  {"split": {"key": "5f…", "seconds": 0.1, "result": {…}}, …},
                "begun": {"train": "81…"}}
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from polar_ft.errors import PolarError, printable
from polar_ft.files import lock_file, write_atomically

FIT_FILE = "fit.json"
LOG_FILE = "logs/fit.log"
# Between two lines of a step where there is no terminal.
SECONDS_BETWEEN_LINES = 30.0
# Larger files are known by their size and time; reading weights of 15 GB at every start would take a minute.
_HASHED_BYTES = 1 << 30
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)

Result = dict[str, Any]
# Says how far a step is: in words, and as a share of it from 0 to 1 where that is known.
Tell = Callable[..., None]


class Done(BaseModel):
    """A finished step: the hash of its inputs, its seconds, and what it found."""

    key: str
    seconds: float
    result: Result


class Record(BaseModel):
    """The content of ``fit.json``.

    Attributes:
        version: Raised when a field changes its meaning.
        done: Finished steps by name.
        begun: Steps that were started, with the hash of their inputs: what a killed one has left may be used.
    """

    version: int = 1
    done: dict[str, Done] = {}
    begun: dict[str, str] = {}


class Steps:
    """Runs the steps of a fit in its folder.

    Args:
        folder: Of the fit; only one process may work in it.
        console: Where steps are shown; what they print themselves goes to the log.
        total: Number of steps, to be shown.
    """

    def __init__(self, folder: Path, console: Console, total: int) -> None:
        self.folder = folder
        self.console = console
        self.total = total
        self.count = 0
        self.ran = 0
        self.record = _read(folder / FIT_FILE)
        if not (folder / FIT_FILE).exists():  # from now on the folder is known to be of a fit
            self._write()
        log = folder / LOG_FILE
        log.parent.mkdir(exist_ok=True)
        # Never closed: what libraries log goes to the stream that there was when they were imported.
        self._log: TextIO = log.open("a", encoding="utf-8", buffering=1)

    def key(self, name: str) -> str:
        """The hash of the inputs of a finished step, as an input of those that use what it made."""
        return self.record.done[name].key

    def forget(self, *names: str) -> None:
        """Makes steps be done again whose result another step is about to replace."""
        for name in names:
            self.record.done.pop(name, None)

    def has_begun(self, name: str, inputs: Any) -> bool:
        """Whether a step with the same inputs was started last."""
        return self.record.begun.get(name) == _hash(inputs)

    def is_done(self, name: str, inputs: Any, outputs: Sequence[Path] = ()) -> bool:
        """Whether a step with the same inputs is finished and what it made is there."""
        done = self.record.done.get(name)
        return done is not None and done.key == _hash(inputs) and all(path.exists() for path in outputs)

    def run(
        self,
        name: str,
        inputs: Any,
        work: Callable[[Tell], Result],
        outputs: Sequence[Path] = (),
        *,
        resumes_in: Path | None = None,
    ) -> Result:
        """Runs a step, or takes its result from ``fit.json``.

        Args:
            name: Of the step.
            inputs: All that its result follows from; can be written as JSON.
            work: Does it, and returns what later steps and the report need; "said" in it is the line that is
                shown.
            outputs: Files and folders that it makes.
            resumes_in: Folder from which it resumes if it was killed; removed if other inputs made it.

        Raises:
            PolarError: The disk is full, or what ``work`` raises.
        """
        self.count += 1
        if self.is_done(name, inputs, outputs):
            result = self.record.done[name].result
            self._show(name, "[dim]·[/]", "[dim]as before[/]", result)
            return result
        self._begin(name, _hash(inputs), resumes_in)
        started = time.monotonic()
        try:
            print(f"==== {name}", file=self._log)
            with self._shown(name) as tell, redirect_stdout(self._log), redirect_stderr(self._log):
                result = work(tell)
        except OSError as error:
            if error.errno not in _DISK_IS_FULL:
                raise
            raise PolarError(
                f"{self.folder}: the disk is full ({error.strerror}) at the step {name}; free some space, "
                f"and the same command continues"
            ) from error
        seconds = time.monotonic() - started
        self.record.done[name] = Done(key=_hash(inputs), seconds=round(seconds, 2), result=result)
        self._write()
        self.ran += 1
        self._show(name, "[green]✓[/]", f"{seconds:.1f} s", result)
        return result

    def _begin(self, name: str, key: str, resumes_in: Path | None) -> None:
        self.record.done.pop(name, None)
        if self.record.begun.get(name) != key:
            # Removed before the new inputs are recorded: a fit that is killed here must not resume a run of
            # the old ones.
            self.record.begun.pop(name, None)
            self._write()
            if resumes_in is not None and resumes_in.exists():
                shutil.rmtree(resumes_in)
            self.record.begun[name] = key
        self._write()

    def _write(self) -> None:
        try:
            write_atomically(self.folder / FIT_FILE, f"{self.record.model_dump_json(indent=1)}\n")
        except OSError as error:
            raise PolarError(f"{self.folder}: cannot be written ({error.strerror or error})") from error

    def _show(self, name: str, mark: str, seconds: str, result: Result) -> None:
        said = escape(printable(str(result.get("said", ""))))
        place = f"{self.count:>2}/{self.total}"
        # The text hangs: a long one is broken into lines that begin below its first.
        width = max(40, self.console.width - 34)
        lines = Text.from_markup(said).wrap(self.console, width)
        first = lines[0].plain if len(lines) else ""
        self.console.print(f"{mark} [dim]{place}[/] {name:<14}[dim]{_right(seconds, 9)}[/]  {escape(first)}")
        for line in lines[1:]:
            self.console.print(f"{'':33}{escape(line.plain)}")

    @contextmanager
    def _shown(self, name: str) -> Iterator[Tell]:
        line = _Line(name, f"{self.count:>2}/{self.total}", self.folder / LOG_FILE)
        last = time.monotonic()

        def tell(text: str, share: float | None = None) -> None:
            nonlocal last
            line.text, line.share = text, share
            if not self.console.is_terminal and time.monotonic() - last >= SECONDS_BETWEEN_LINES:
                self.console.print(line.plain(), markup=False, soft_wrap=True)
                last = time.monotonic()

        with Live(
            line,
            console=self.console,
            transient=True,
            refresh_per_second=4,
            redirect_stdout=False,
            redirect_stderr=False,
            auto_refresh=self.console.is_terminal,
        ):
            yield tell


class _Line:
    """What is shown of a step while it runs: a bar where its share is known, the time, and words."""

    def __init__(self, name: str, place: str, log: Path) -> None:
        self.name = name
        self.place = place
        self.log = log
        self.text = ""
        self.share: float | None = None
        self.started = time.monotonic()

    def plain(self) -> str:
        """One line of text."""
        seconds = time.monotonic() - self.started
        parts = [f"… {self.place} {self.name:<14}{clock(seconds)}"]
        if self.share:
            parts.append(f"{self.share:4.0%}, {clock(seconds * (1 - self.share) / self.share)} left")
        return "  ".join([*parts, printable(self.text or _last_line(self.log))])

    def __rich__(self) -> Text:
        bar = ""
        if self.share is not None:
            filled = round(20 * min(1.0, self.share))
            bar = f"{'━' * filled}{'╌' * (20 - filled)}  "
        return Text(bar, "cyan", end="").append(Text(self.plain(), "none", no_wrap=True, overflow="ellipsis"))


def _last_line(log: Path) -> str:
    """What a step printed last: the commands that steps call say there how far they are."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 1000))
        lines = stream.read().decode("utf-8", "replace").replace("\r", "\n").split("\n")
    found = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return "" if found.startswith("====") else found[:100]


def clock(seconds: float) -> str:
    """A time as minutes and seconds.

    >>> clock(5), clock(75), clock(3700)
    ('0:05', '1:15', '1:01:40')
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _right(text: str, width: int) -> str:
    """Aligns text on the right; markup in it has no width."""
    return " " * max(0, width - len(Text.from_markup(text))) + text


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder of a fit and keeps other fits out of it; a killed one leaves no lock.

    Raises:
        PolarError: Another fit is running in it, it holds something else, or it cannot be written.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / FIT_FILE).exists():
        left = {path.name for path in folder.iterdir()}
        if not all(name in (".fit.lock", "logs") or name.startswith(f".{FIT_FILE}.") for name in left):
            raise PolarError(
                f"{folder}: is not empty and holds no {FIT_FILE}, so it is not of a fit; name another folder"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_file(
            folder / ".fit.lock",
            f"{folder}: another polar-ft fit is running in it; wait for it, or name another folder",
        )
    except OSError as error:
        reason = error.strerror or error
        raise PolarError(f"{folder}: cannot be written ({reason}); name another folder") from error
    with lock:
        yield


def content_of(path: Path | str) -> Any:
    """What a file or folder is known by: the hash of each file's content, of very large ones size and time.

    A name that is no file (a model or data set of the hub) is known by itself.
    """
    path = Path(path)
    if path.is_file():
        return _file_hash(path)
    if path.is_dir():
        files = (file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith("."))
        return {file.relative_to(path).as_posix(): _file_hash(file) for file in files}
    return str(path)


def _file_hash(file: Path) -> str:
    status = file.stat()
    if status.st_size > _HASHED_BYTES:
        return f"{status.st_size}@{status.st_mtime_ns}"
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:32]


def _hash(inputs: Any) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _read(file: Path) -> Record:
    if not file.is_file():
        return Record()
    try:
        return Record.model_validate_json(file.read_bytes())
    except (ValidationError, OSError) as error:
        raise PolarError(f"{file}: is damaged; remove its folder, or name another one with --out") from error
