"""Scores that were computed before: one SQLite file for all models, by model, template, dtype and input.

A score is looked up by what decides it and by nothing else: the content of the model's files, the template
(tokenizer, control tokens, limits), the dtype, the kind of device, and the texts. So an interrupted
evaluation resumes, a second one computes nothing, whatever its output folder, and one with a changed model or
limit computes everything again.
"""

from __future__ import annotations

import hashlib
import math
import sqlite3
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from polar_ft.data.records import Example
from polar_ft.errors import PolarError
from polar_ft.evaluation.evaluator import Scorer
from polar_ft.template import PolarTemplate

DEFAULT_CACHE = Path("~/.cache/polar_ft")
CACHE_FILE = "scores.sqlite"

# About 20 million scores. Beyond it the scores of the models that were not used for longest go.
LIMIT_BYTES = 1 << 30

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, size INTEGER, changed INTEGER, sha256 TEXT);
CREATE TABLE IF NOT EXISTS setups (id INTEGER PRIMARY KEY, key TEXT UNIQUE, used REAL);
CREATE TABLE IF NOT EXISTS scores
    (setup INTEGER, input BLOB, score REAL, PRIMARY KEY (setup, input)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS gates (setup INTEGER, sample TEXT, result TEXT, PRIMARY KEY (setup, sample));
"""
_VARIABLES = 500  # SQLite takes at least 999 in one statement

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


class ScoreCache:
    """The file of scores. Several runs may use it at once.

    Args:
        folder: Where the file lies; made where it is missing.
        limit_bytes: What the scores in it may take.

    Attributes:
        file: The file.
        n_kept: Scores that were written into it here.

    Raises:
        OSError, sqlite3.Error: It cannot be opened, or is no such file.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> with ScoreCache(Path(folder.name)) as cache:
    ...     cache.put("a set-up", {b"input 1": 0.5, b"input 2": float("nan")})
    ...     cache.get("a set-up", [b"input 1", b"input 2"]), cache.get("another", [b"input 1"])
    ({b'input 1': 0.5}, {})
    >>> folder.cleanup()
    """

    def __init__(self, folder: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / CACHE_FILE
        self.n_kept = 0
        self._db = sqlite3.connect(self.file, timeout=60)
        try:
            self._db.executescript(_SCHEMA)
            self._make_room(limit_bytes)
        except sqlite3.Error:
            self._db.close()
            raise

    def __enter__(self) -> ScoreCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()

    def get(self, setup: str, inputs: Sequence[bytes]) -> dict[bytes, float]:
        """The known scores among the inputs.

        Args:
            setup: What scores them; see `setup_key`.
            inputs: Keys of the inputs; see `input_key`.
        """
        number = self._setup(setup)
        found: dict[bytes, float] = {}
        for start in range(0, len(inputs), _VARIABLES):
            part = inputs[start : start + _VARIABLES]
            marks = ",".join("?" * len(part))
            query = f"SELECT input, score FROM scores WHERE setup = ? AND input IN ({marks})"
            found.update(self._db.execute(query, (number, *part)))
        return found

    def put(self, setup: str, scores: Mapping[bytes, float]) -> None:
        """Keeps scores; those that are NaN or infinite are left out, to be computed again.

        Raises:
            PolarError: They could not be written.
        """
        number = self._setup(setup)
        rows = [(number, key, score) for key, score in scores.items() if math.isfinite(score)]
        with self._writing():
            self._db.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", rows)
        self.n_kept += len(rows)

    def get_gates(self, setup: str, sample: str) -> str | None:
        """What `put_gates` kept for the same set-up and sample."""
        query = "SELECT result FROM gates WHERE setup = ? AND sample = ?"
        row = self._db.execute(query, (self._setup(setup), sample)).fetchone()
        return None if row is None else row[0]

    def put_gates(self, setup: str, sample: str, result: str) -> None:
        """Keeps the results of the gates on a sample, as text."""
        values = (self._setup(setup), sample, result)
        with self._writing():
            self._db.execute("INSERT OR REPLACE INTO gates VALUES (?, ?, ?)", values)

    def sha256(self, file: Path) -> str:
        """SHA-256 of a file's content; read again only when its size or time of change is another."""
        state, path = file.stat(), str(file.resolve())
        query = "SELECT sha256 FROM files WHERE path = ? AND size = ? AND changed = ?"
        known = self._db.execute(query, (path, state.st_size, state.st_mtime_ns)).fetchone()
        if known is not None:
            return known[0]
        digest = file_sha256(file)
        with self._writing():
            values = (path, state.st_size, state.st_mtime_ns, digest)
            self._db.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", values)
        return digest

    def _setup(self, key: str) -> int:
        row = self._db.execute("SELECT id FROM setups WHERE key = ?", (key,)).fetchone()
        if row is None:
            with self._writing():
                self._db.execute("INSERT OR IGNORE INTO setups (key, used) VALUES (?, ?)", (key, time.time()))
            row = self._db.execute("SELECT id FROM setups WHERE key = ?", (key,)).fetchone()
        return row[0]

    def touch(self, setup: str) -> None:
        """Says that a set-up is in use, so that its scores are among the last to go."""
        number = self._setup(setup)
        with self._writing():
            self._db.execute("UPDATE setups SET used = ? WHERE id = ?", (time.time(), number))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with self._db:
                yield
        except sqlite3.Error as error:
            raise PolarError(
                f"{self.file}: the scores could not be written ({error}); make room or name another folder "
                f"with --cache-dir (with --no-cache: --out). The same command resumes with what was scored"
            ) from error

    def _make_room(self, limit_bytes: int) -> None:
        def used() -> int:
            pages, free, size = (
                self._db.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("page_count", "freelist_count", "page_size")
            )
            return (pages - free) * size

        while used() > limit_bytes:
            oldest = self._db.execute("SELECT id FROM setups ORDER BY used LIMIT 1").fetchone()
            if oldest is None:
                return
            with self._db:
                for table in ("scores", "gates"):
                    self._db.execute(f"DELETE FROM {table} WHERE setup = ?", oldest)
                self._db.execute("DELETE FROM setups WHERE id = ?", oldest)


class CachedScorer:
    """A scorer that computes only what the cache does not have.

    Args:
        scorer: Computes.
        cache: Keeps them.
        setup: What scores; see `setup_key`.

    Attributes:
        n_computed: Rewards that the scorer computed.
        n_from_cache: Rewards that it did not need to.
    """

    def __init__(self, scorer: Scorer, cache: ScoreCache, setup: str) -> None:
        self.scorer, self.cache, self.setup = scorer, cache, setup
        self.n_computed = self.n_from_cache = 0

    @property
    def template(self) -> PolarTemplate:
        """The scorer's template."""
        return self.scorer.template

    @property
    def dtype(self) -> object:
        """In which dtype the scorer computes."""
        return self.scorer.dtype

    @property
    def device(self) -> object:
        """Where it computes."""
        return self.scorer.device

    def knows(self, examples: Iterable[Example]) -> bool:
        """Whether the cache has every reward of the examples."""
        keys = {input_key(example, text) for example in examples for text in example.candidates}
        return len(self.cache.get(self.setup, list(keys))) == len(keys)

    def score_examples(self, examples: list[Example]) -> list[list[float]]:
        """A reward for each candidate of each example, `[examples][candidates]`, in the order given."""
        keys = [[input_key(example, text) for text in example.candidates] for example in examples]
        known = self.cache.get(self.setup, [key for row in keys for key in row])
        self.n_from_cache += len(known)
        missing = []
        asked: list[list[bytes]] = []
        for example, row in zip(examples, keys, strict=True):
            candidates = {
                key: text for key, text in zip(row, example.candidates, strict=True) if key not in known
            }
            if candidates:
                missing.append(replace(example, candidates=tuple(candidates.values()), pairs=()))
                asked.append(list(candidates))
        computed: dict[bytes, float] = {}
        answers = self.scorer.score_examples(missing) if missing else []
        for row, rewards in zip(asked, answers, strict=True):
            computed.update(zip(row, rewards, strict=True))
            self.n_computed += len(rewards)
        self.cache.put(self.setup, computed)
        known.update(computed)
        return [[known[key] for key in row] for row in keys]


def input_key(example: Example, candidate: str) -> bytes:
    """A hash of the texts that one reward is for, 16 bytes."""
    return _digest((example.wrapper, example.prompt, example.reference, candidate))


def setup_key(parts: Iterable[str]) -> str:
    """A hash of what scores: the model's hash, dtype, device, template."""
    return _digest(parts).hex()


def model_hash(folder: Path, cache: ScoreCache | None = None) -> str | None:
    """SHA-256 of what ``sha256sum`` says of a model's weights and ``config.json``; None without weights.

    Args:
        folder: The model's folder.
        cache: Remembers the hashes of files that have not changed: 14 GB are read once, not every time.
    """
    weights = sorted(file for pattern in _WEIGHTS for file in folder.glob(pattern))
    if not weights:
        return None
    files = [*weights, folder / "config.json"]
    sha256 = file_sha256 if cache is None else cache.sha256
    lines = "".join(f"{sha256(file)}  {file.name}\n" for file in files if file.is_file())
    return hashlib.sha256(lines.encode()).hexdigest()


def tokenizer_hash(folder: Path) -> str:
    """SHA-256 of the files of a model's tokenizer, whatever kind it is."""
    files = sorted(file for file in folder.glob("*token*") if file.is_file())
    return hashlib.sha256(
        "".join(f"{file_sha256(file)}  {file.name}\n" for file in files).encode()
    ).hexdigest()


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest(parts: Iterable[str]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        # The length keeps ("ab", "c") and ("a", "bc") apart.
        digest.update(struct.pack("<Q", len(data)))
        digest.update(data)
    return digest.digest()
