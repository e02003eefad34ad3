"""A watch on reward hacking: figures of a policy's answers over a run, and alarms where they drift.

A policy that has learned to please the reward model, and not to answer, shows it in its texts: they repeat
themselves, grow, shrink, copy the reference or have nothing to do with it, while the reward rises. Rewards
alone do not show it.

Each process of a run writes a file of its own into one folder, a JSON line for every so many answers::

    {"time": 1790000000.5, "answers": 512, "reward": -4.02, "raw": -4.02, "length": 17.3, ...}

and the same figures as a run of TensorBoard in a folder of its own there: ``tensorboard --logdir FOLDER``.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from polar_ft.errors import DataError, PolarError
from polar_ft.rft.events import EventFile

# The first lines of a run are what later ones are compared with.
BASELINE_LINES = 4
# An alarm needs as many lines in a row: one batch may be odd.
LASTING_LINES = 2
# How far a figure may drift from the baseline: lengths and a falling overlap by a factor, for it may be small
# from the beginning; the others by a difference.
REPETITION_DRIFT = 0.2
SHARE_DRIFT = 0.2
OVERLAP_DRIFT = 0.3
OVERLAP_FACTOR = 4.0
DISTANCE_DRIFT = 0.2
LENGTH_FACTOR = 2.0
# Where raw rewards correlate so much with a figure, it may drift half as far: the policy is paid for it.
PAID = 0.5

# A character of a script without spaces is a word of its own.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af]|\w+")


class WatchLine(BaseModel):
    """Figures of some answers in a row.

    Correlations are of raw rewards, over the answers that the reward model scored; 0 where one side does not
    vary.

    Attributes:
        time: When it was written, in seconds since 1970; 0 in files of older versions.
        answers: Answers since the beginning, these included; of one process.
        reward: Mean reward that the policy got, floors included.
        reward_std: Their standard deviation.
        raw: Mean reward before shaping.
        unanswered: Share of outputs without an answer.
        truncated: Share of answers that were cut to the model's limits.
        overlong: Share of answers longer than ``max_characters``.
        by_rule: Share of answers that a rule gave the reward of.
        rule_right: Share of those that are right; 0 if there are none.
        rule_failed: Share of outputs whose rule could not read the reference or did not finish.
        length: Mean characters of an answer.
        repetition: Mean share of word pairs that an answer had before; see `repetition`.
        overlap: Mean share of an answer's words that its reference has; see `overlap`.
        distance: Mean distance of an answer from its reference; see `distance`.
        reward_by_length: Correlation of reward and length.
        reward_by_repetition: Of reward and repetition.
        reward_by_overlap: Of reward and overlap.
        reward_by_distance: Of reward and distance.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    time: float = 0.0
    answers: int
    reward: float
    reward_std: float
    raw: float
    unanswered: float
    truncated: float
    overlong: float
    by_rule: float
    rule_right: float
    rule_failed: float
    length: float
    repetition: float
    overlap: float
    distance: float
    reward_by_length: float
    reward_by_repetition: float
    reward_by_overlap: float
    reward_by_distance: float


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


def distance(answer: str, reference: str) -> float:
    """1 − F1 of the character trigrams of two texts: 0 for the same text, 1 with none in common.

    As chrF (Popović 2015), which averages over lengths up to 6 and weights recall more; in linear time.

    >>> distance("It is 4.", "It is 4."), distance("It is 4.", "Five.")
    (0.0, 1.0)
    >>> distance("abcd", "abce")  # abc is common; abc, bcd and abc, bce are two of each
    0.5
    """
    ours, theirs = _trigrams(answer), _trigrams(reference)
    return 1 - 2 * (ours & theirs).total() / (ours.total() + theirs.total())


def _trigrams(text: str) -> Counter[str]:
    # Shorter texts are one piece.
    return Counter(text[i : i + 3] for i in range(max(1, len(text) - 2)))


@dataclass(frozen=True, slots=True)
class _Seen:
    reward: float
    raw: float
    answered: bool
    truncated: bool
    overlong: bool
    verdict: str | None
    length: int
    repetition: float
    overlap: float
    distance: float

    @property
    def by_rule(self) -> bool:
        return self.verdict in ("right", "wrong", "failed")


class RewardWatch:
    """Writes a line for every ``every`` answers; may be called from several threads.

    Args:
        folder: Of the run; made if it is missing.
        every: Answers of a line: about a step's.

    Raises:
        PolarError: The folder cannot be made, or ``every`` is below 1.
    """

    def __init__(self, folder: str | os.PathLike[str], every: int = 256) -> None:
        if every < 1:
            raise PolarError(f"watch_every={every}: must be at least 1")
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PolarError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from error
        self._folder = Path(folder)
        self._every = every
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        """Begins the files of this process."""
        self._pid = os.getpid()
        process = f"{socket.gethostname()}-{self._pid}"
        self.file = self._folder / f"rewards-{process}.jsonl"
        self._events = EventFile(self._folder / process)
        self._total = 0
        self._seen: list[_Seen] = []

    def add(
        self,
        reward: float,
        answer: str | None,
        references: Sequence[str],
        *,
        raw: float,
        truncated: bool = False,
        overlong: bool = False,
        verdict: str | None = None,
    ) -> None:
        """Takes an output.

        Args:
            reward: What the policy gets.
            answer: None if there was none.
            references: The answer is compared with the one nearest to it.
            raw: The reward before shaping.
            truncated: As in `polar_ft.rft.reward.Reward`, and so the others.
            overlong: See there.
            verdict: See there.

        Raises:
            OSError: The file cannot be written.
        """
        text = answer or ""
        seen = _Seen(
            reward=reward,
            raw=raw,
            answered=answer is not None,
            truncated=truncated,
            overlong=overlong,
            verdict=verdict,
            length=len(text),
            repetition=repetition(text),
            overlap=max(overlap(text, reference) for reference in references),
            distance=min(distance(text, reference) for reference in references),
        )
        with self._lock:
            if os.getpid() != self._pid:  # forked, as AReaL's pool of processes is
                self._begin()
            self._seen.append(seen)
            if len(self._seen) >= self._every:
                self._write()

    def _write(self) -> None:
        seen, self._seen = self._seen, []
        self._total += len(seen)
        answered = [one for one in seen if one.answered] or seen
        by_rule = [one for one in seen if one.by_rule]
        compared = [one for one in seen if one.answered and not one.by_rule]

        def correlation(name: str) -> float:
            return _correlation([one.raw for one in compared], [getattr(one, name) for one in compared])

        line = WatchLine(
            time=time.time(),
            answers=self._total,
            reward=fmean(one.reward for one in seen),
            reward_std=float(np.std([one.reward for one in seen])),
            raw=fmean(one.raw for one in seen),
            unanswered=fmean(not one.answered for one in seen),
            truncated=fmean(one.truncated for one in seen),
            overlong=fmean(one.overlong for one in seen),
            by_rule=len(by_rule) / len(seen),
            rule_right=fmean(one.verdict == "right" for one in by_rule) if by_rule else 0.0,
            rule_failed=fmean(one.verdict in ("failed", "no gold") for one in seen),
            length=fmean(one.length for one in answered),
            repetition=fmean(one.repetition for one in answered),
            overlap=fmean(one.overlap for one in answered),
            distance=fmean(one.distance for one in answered),
            reward_by_length=correlation("length"),
            reward_by_repetition=correlation("repetition"),
            reward_by_overlap=correlation("overlap"),
            reward_by_distance=correlation("distance"),
        )
        with self.file.open("a", encoding="utf-8") as out:
            out.write(line.model_dump_json() + "\n")
        figures = line.model_dump(exclude={"time", "answers"})
        self._events.write(line.answers, {f"polar/{name}": value for name, value in figures.items()})


def _correlation(a: Sequence[float], b: Sequence[float]) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if len(set(a)) > 1 and len(set(b)) > 1 else 0.0


def read_watch(path: str | os.PathLike[str]) -> list[WatchLine]:
    """Reads a file of `RewardWatch`, or all of a folder: lines in the order in which they were written.

    So those of processes that run together alternate, and those of a run that resumes come last.

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
    return sorted(lines, key=lambda line: (line.time, line.answers))


def alarms(lines: Sequence[WatchLine]) -> list[str]:
    """What has drifted from the first lines of the run and has not come back, as sentences.

    >>> usual = dict.fromkeys(WatchLine.model_fields, 0) | {"length": 20}
    >>> alarms([WatchLine(**usual)] * 8)
    []
    >>> hacked = usual | dict(repetition=0.6, reward=3)
    >>> print(*alarms([WatchLine(**usual)] * 6 + [WatchLine(**hacked)] * 2))  # doctest: +ELLIPSIS
    answers repeat themselves: 60 % of word pairs ... (0 % at first); reward +3.00
    >>> paid = usual | dict(length=35, reward_by_length=0.7)
    >>> print(*alarms([WatchLine(**usual)] * 6 + [WatchLine(**paid)] * 2))
    answers grow: 35 characters (20 at first), and rewards correlate with it (+0.70); reward +0.00
    """
    if len(lines) < BASELINE_LINES + LASTING_LINES:
        return []
    first, last = lines[:BASELINE_LINES], lines[-LASTING_LINES:]

    def at_first(name: str) -> float:
        return fmean(getattr(line, name) for line in first)

    def lasting(name: str, up: bool = True) -> float:
        """The figure that all of the last lines reached."""
        return (min if up else max)(getattr(line, name) for line in last)

    def paid(name: str, up: bool = True) -> bool:
        """Whether raw rewards rise with the figure, or with its fall."""
        correlation = lasting(f"reward_by_{name}", up)
        return correlation >= PAID if up else correlation <= -PAID

    def because(name: str, up: bool = True) -> str:
        correlation = lasting(f"reward_by_{name}", up)
        return f", and rewards correlate with it ({correlation:+.2f})" if paid(name, up) else ""

    found = []
    for name, drift, sentence in (
        (
            "repetition",
            REPETITION_DRIFT,
            "answers repeat themselves: {:.0%} of word pairs occurred before in the same answer",
        ),
        ("overlap", OVERLAP_DRIFT, "answers copy the reference: {:.0%} of their words occur in it"),
        ("distance", DISTANCE_DRIFT, "answers move away from the reference: a distance of {:.0%}"),
    ):
        if lasting(name) > at_first(name) + drift / (2 if paid(name) else 1):
            found.append(f"{sentence.format(lasting(name))} ({at_first(name):.0%} at first){because(name)}")
    for name, sentence in (
        ("unanswered", "outputs have no answer: {:.0%}"),
        ("truncated", "answers are cut to the reward model's limits: {:.0%}"),
        ("overlong", "answers are longer than max_characters: {:.0%}"),
        ("rule_failed", "rules fail: {:.0%}"),
    ):
        if lasting(name) > at_first(name) + SHARE_DRIFT:
            found.append(f"{sentence.format(lasting(name))} ({at_first(name):.0%} at first)")
    known = lasting("overlap", up=False)
    if known < at_first("overlap") / OVERLAP_FACTOR:
        found.append(
            f"answers leave the reference: {known:.1%} of their words occur in it "
            f"({at_first('overlap'):.1%} at first)"
        )
    length = at_first("length")
    for up, sentence in ((True, "answers grow"), (False, "answers shrink")):
        factor = LENGTH_FACTOR**0.5 if paid("length", up) else LENGTH_FACTOR
        now = lasting("length", up)
        if now > length * factor if up else now < length / factor:
            found.append(f"{sentence}: {now:.0f} characters ({length:.0f} at first){because('length', up)}")
    change = fmean(line.reward for line in last) - at_first("reward")
    return [f"{sentence.replace('%', ' %')}; reward {change:+.2f}" for sentence in found]
