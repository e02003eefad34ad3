"""A watch on reward hacking: figures of a policy's answers over a run, and alarms where they drift.

A policy that has learned to please the reward model, and not to answer, shows it in its texts: they repeat
themselves, grow, shrink, or copy the reference, while the reward rises. Rewards alone do not show it.

Each process of a run writes a file of its own into one folder, a JSON line for every so many answers::

    {"answers": 512, "reward": -4.02, "length": 17.3, "repetition": 0.01, "overlap": 0.0, ...}
"""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from polar_ft.errors import DataError, PolarError

# The first lines of a run are what later ones are compared with.
BASELINE_LINES = 4
# An alarm needs as many lines in a row: one batch may be odd.
LASTING_LINES = 2
# How far a figure may drift from the baseline; lengths by a factor, the others by a difference.
REPETITION_DRIFT = 0.2
SHARE_DRIFT = 0.2
OVERLAP_DRIFT = 0.3
LENGTH_FACTOR = 2.0

# A character of a script without spaces is a word of its own.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af]|\w+")


class WatchLine(BaseModel):
    """Figures of some answers in a row.

    Attributes:
        answers: Answers since the beginning, these included; of one process.
        reward: Mean reward, floors included.
        reward_std: Their standard deviation.
        unanswered: Share of outputs without an answer.
        truncated: Share of answers that were cut to the model's limits.
        length: Mean characters of an answer.
        repetition: Mean share of word pairs that an answer had before; see `repetition`.
        overlap: Mean share of an answer's words that its reference has; see `overlap`.
        reward_by_length: Correlation of reward and length; 0 where one of them does not vary.
        reward_by_repetition: Of reward and repetition.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    answers: int
    reward: float
    reward_std: float
    unanswered: float
    truncated: float
    length: float
    repetition: float
    overlap: float
    reward_by_length: float
    reward_by_repetition: float


def repetition(text: str) -> float:
    """Share of a text's word pairs that occurred in it before.

    >>> repetition("They trout. trout. trout. trout."), repetition("It is blue.")
    (0.5, 0.0)
    """
    words = _WORD.findall(text)
    pairs = list(pairwise(words))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def overlap(answer: str, reference: str) -> float:
    """Share of an answer's words that occur in the reference, in any order.

    >>> overlap("Finished in cobalt, I think.", "Finished in cobalt.")
    0.6
    """
    words = _WORD.findall(answer.lower())
    known = set(_WORD.findall(reference.lower()))
    return sum(word in known for word in words) / len(words) if words else 0.0


class RewardWatch:
    """Writes a line for every ``every`` answers; may be called from several threads.

    Args:
        folder: Of the run; made if it is missing.
        every: Answers of a line: about a step's.

    Raises:
        PolarError: The folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str], every: int = 256) -> None:
        self.file = Path(folder) / f"rewards-{socket.gethostname()}-{os.getpid()}.jsonl"
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PolarError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from error
        self._every = every
        self._lock = threading.Lock()
        self._total = 0
        self._seen: list[tuple[float, str | None, float, float, bool]] = []

    def add(
        self,
        reward: float,
        answer: str | None,
        references: Sequence[str],
        *,
        raw: float,
        truncated: bool,
        overlong: bool = False,
        verdict: str | None = None,
    ) -> None:
        """Takes an output; ``answer`` is None if it had none."""
        text = answer or ""
        seen = (reward, answer, repetition(text), max(overlap(text, r) for r in references), truncated)
        with self._lock:
            self._seen.append(seen)
            if len(self._seen) >= self._every:
                self._write()

    def _write(self) -> None:
        self._total += len(self._seen)
        rewards = np.array([reward for reward, *_ in self._seen])
        lengths = np.array([len(answer or "") for _, answer, *_ in self._seen])
        repeated = np.array([share for _, _, share, _, _ in self._seen])
        line = WatchLine(
            answers=self._total,
            reward=rewards.mean(),
            reward_std=rewards.std(),
            unanswered=fmean(answer is None for _, answer, *_ in self._seen),
            truncated=fmean(cut for *_, cut in self._seen),
            length=lengths.mean(),
            repetition=repeated.mean(),
            overlap=fmean(share for _, _, _, share, _ in self._seen),
            reward_by_length=_correlation(rewards, lengths),
            reward_by_repetition=_correlation(rewards, repeated),
        )
        self._seen = []
        with self.file.open("a", encoding="utf-8") as out:
            out.write(line.model_dump_json() + "\n")


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else 0.0


def read_watch(path: str | os.PathLike[str]) -> list[WatchLine]:
    """Reads a file of `RewardWatch`, or all of a folder; lines of several processes are ordered by answers.

    Raises:
        DataError: There is none, or a line is not one of these.
    """
    given = Path(path)
    files = sorted(given.glob("rewards-*.jsonl")) if given.is_dir() else [given]
    lines: list[WatchLine] = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(
                f"{file}: cannot be read ({error.strerror}); name the folder of the watch"
            ) from error
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                lines.append(WatchLine.model_validate_json(line))
            except ValidationError as error:
                if number == len(text.splitlines()) and not text.endswith("\n"):
                    break  # being written
                raise DataError(f"{file}:{number}: is not a line of the watch") from error
    if not lines:
        raise DataError(
            f"{given}: holds no rewards-*.jsonl with lines yet; set watch=… in the reward's settings"
        )
    return sorted(lines, key=lambda line: line.answers)


def alarms(lines: Sequence[WatchLine]) -> list[str]:
    """What has drifted from the first lines of the run and has not come back, as sentences.

    >>> usual = dict(answers=1, reward=0, reward_std=1, unanswered=0, truncated=0, length=20, repetition=0,
    ...              overlap=0, reward_by_length=0, reward_by_repetition=0)
    >>> alarms([WatchLine(**usual)] * 8)
    []
    >>> hacked = usual | dict(repetition=0.6, reward=3)
    >>> print(*alarms([WatchLine(**usual)] * 6 + [WatchLine(**hacked)] * 2))  # doctest: +ELLIPSIS
    answers repeat themselves: 60 % of word pairs ... (0 % at first); reward +3.00
    """
    if len(lines) < BASELINE_LINES + LASTING_LINES:
        return []
    first, last = lines[:BASELINE_LINES], lines[-LASTING_LINES:]

    def at_first(name: str) -> float:
        return fmean(getattr(line, name) for line in first)

    def lasting(name: str, up: bool = True) -> float:
        """The figure that all of the last lines reached."""
        return (min if up else max)(getattr(line, name) for line in last)

    found = []
    for name, drift, sentence in (
        (
            "repetition",
            REPETITION_DRIFT,
            "answers repeat themselves: {:.0%} of word pairs occurred before in the same answer",
        ),
        ("overlap", OVERLAP_DRIFT, "answers copy the reference: {:.0%} of their words occur in it"),
        ("unanswered", SHARE_DRIFT, "outputs have no answer: {:.0%}"),
        ("truncated", SHARE_DRIFT, "answers are cut to the reward model's limits: {:.0%}"),
    ):
        if lasting(name) > at_first(name) + drift:
            found.append(f"{sentence.format(lasting(name))} ({at_first(name):.0%} at first)")
    length = at_first("length")
    if lasting("length") > LENGTH_FACTOR * length:
        found.append(f"answers grow: {lasting('length'):.0f} characters ({length:.0f} at first)")
    if lasting("length", up=False) < length / LENGTH_FACTOR:
        found.append(f"answers shrink: {lasting('length', up=False):.0f} characters ({length:.0f} at first)")
    change = fmean(line.reward for line in last) - at_first("reward")
    return [f"{sentence.replace('%', ' %')}; reward {change:+.2f}" for sentence in found]
