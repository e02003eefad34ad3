"""`PolarReward`: the rewards of a policy's outputs; every adapter in this folder calls it.

Frameworks ask for rewards in two ways: for a batch, or for one sample at a time, many at once. Samples that
arrive within a few milliseconds are sent together, and those of one (prompt, reference) share their prefix on
the server. Whatever happens, a sample gets its own reward or an error that names server and sample: never
None, never 0 in place of a reward.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import lru_cache
from inspect import signature
from statistics import fmean
from typing import Any, Literal

from polar_ft.client.client import RewardModelClient
from polar_ft.client.contact import ServerType
from polar_ft.data.answers import Thinking
from polar_ft.data.records import RowError
from polar_ft.data.score_rows import parse_score_row
from polar_ft.errors import PolarError
from polar_ft.files import first_line
from polar_ft.groups import TextGroup, TokenGroup, against, merge_texts
from polar_ft.reward_scale import FILE_NAME, RewardScale
from polar_ft.rft.watch import RewardWatch
from polar_ft.template import EncodeError

LOGGER = logging.getLogger("polar_ft.rft")


@dataclass(frozen=True, slots=True)
class Reward:
    """The reward of one output.

    Attributes:
        score: The reward model's raw reward, or the floor if there was no answer.
        answered: Whether there was an answer to score.
        truncated: Whether prompt, reference or answer was cut to the model's length limits.
        length: Characters of the answer.
    """

    score: float
    answered: bool
    truncated: bool
    length: int

    def as_row(self) -> dict[str, float]:
        """All figures as numbers under fixed keys, as frameworks log them.

        >>> Reward(-1.5, answered=True, truncated=False, length=12).as_row()
        {'score': -1.5, 'answered': 1.0, 'truncated': 0.0, 'length': 12.0}
        """
        return {
            "score": self.score,
            "answered": float(self.answered),
            "truncated": float(self.truncated),
            "length": float(self.length),
        }


class PolarReward:
    """Rewards of a policy's outputs from one or several servers that run a POLAR model.

    Args:
        model: Folder of the reward model, or a hub id; only tokenizer and settings are read.
        server_address: ``host:port`` or a URL, or several of them.
        server_type: As in `RewardModelClient`.
        api_key: As in `RewardModelClient`.
        timeout: Seconds that one request may take in total.
        max_wait: Seconds for which a request waits for servers that are away or busy. A server that is
            restarted costs a training run time and nothing else, so it is long.
        floor: The reward of an output without an answer; None takes that of `measured_floor`.
        references: With several references the reward is the greatest of those against each of them
            ("max"), or their mean.
        think_start: Opening tag of thoughts; an empty text if the policy has none.
        think_end: Closing tag.
        think_in_prompt: Whether the prompt template ends with the opening tag; see `Thinking`.
        gather_ms: Milliseconds for which single samples wait for others to be sent with.
        watch: Folder for figures of the answers, which `polar-ft rft watch` shows; see `RewardWatch`.
        watch_every: Answers of one line there.

    Raises:
        PolarError: A setting is wrong, or there is no floor.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        server_address: str | Sequence[str] = "127.0.0.1:30000",
        *,
        server_type: ServerType = "auto",
        api_key: str | None = None,
        timeout: float = 120.0,
        max_wait: float = 1800.0,
        floor: float | None = None,
        references: Literal["max", "mean"] = "max",
        think_start: str = "<think>",
        think_end: str = "</think>",
        think_in_prompt: bool = False,
        gather_ms: float = 5.0,
        watch: str | os.PathLike[str] | None = None,
        watch_every: int = 256,
    ) -> None:
        if references not in ("max", "mean"):
            raise PolarError(f"references={references!r}: must be 'max' or 'mean'")
        if bool(think_start) != bool(think_end):
            raise PolarError("think_start and think_end: give both tags, or two empty texts for none")
        self.floor = measured_floor(model) if floor is None else float(floor)
        self.thinking = Thinking(think_start, think_end, think_in_prompt) if think_start else None
        self.client = RewardModelClient(
            model,
            server_address=server_address,
            server_type=server_type,
            api_key=api_key,
            timeout=timeout,
            max_wait=max_wait,
            # `max_wait` alone says how long a server may be away.
            max_retries=10**6,
        )
        self._combine: Callable[[list[float]], float] = max if references == "max" else fmean
        self._watch = RewardWatch(watch, watch_every) if watch is not None else None
        self._gather_seconds = gather_ms / 1000
        self._lock = threading.Lock()
        self._waiting: list[tuple[TextGroup, Future[Reward]]] = []

    def score(self, samples: Sequence[TextGroup]) -> list[Reward]:
        """Scores a batch; rewards come in its order.

        Args:
            samples: Each with one candidate, the policy's output, thoughts included.

        Raises:
            PolarError: A sample cannot be encoded; the message names it.
            RewardServerError: No server answered within ``max_wait`` seconds, or one did not give rewards.
        """
        futures: list[Future[Reward]] = [Future() for _ in samples]
        self._send(list(zip(samples, futures, strict=True)))
        return [future.result() for future in futures]

    async def score_async(self, sample: TextGroup) -> Reward:
        """Scores one sample, from a coroutine; what other coroutines and threads ask for is sent with it."""
        return await asyncio.wrap_future(self.submit(sample))

    def submit(self, sample: TextGroup) -> Future[Reward]:
        """Starts scoring one sample; what is submitted within ``gather_ms`` is sent together."""
        future: Future[Reward] = Future()
        with self._lock:
            self._waiting.append((sample, future))
            first = len(self._waiting) == 1
        if first:
            timer = threading.Timer(self._gather_seconds, self._send_waiting)
            timer.daemon = True
            timer.start()
        return future

    def close(self) -> None:
        """Closes the connections."""
        self.client.close()

    def _send_waiting(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        try:
            self._send(waiting)
        except BaseException as error:  # in a timer's thread nobody else would learn of it
            for _, future in waiting:
                if not future.done():
                    _settle(future, error)

    def _send(self, work: Sequence[tuple[TextGroup, Future[Reward]]]) -> None:
        """Encodes samples and asks for their rewards; each future gets its own reward or an error."""
        asked: list[_Asked] = []
        groups: list[TextGroup] = []
        for sample, future in work:
            (output,) = sample.candidates
            answer = self.thinking.answer(output) if self.thinking else output.strip()
            if not answer:
                self._deliver(future, sample, None, Reward(self.floor, False, False, 0))
                continue
            first = len(groups)
            groups += [replace(against(sample, text), candidates=(answer,)) for text in sample.references]
            asked.append(_Asked(sample, answer, future, range(first, len(groups))))

        merged = merge_texts(groups)
        encoded = self.client.template.encode_each([texts.group for texts in merged])
        found = {
            number: (encoded[place], candidate)
            for place, texts in enumerate(merged)
            for number, (candidate,) in texts.members
        }
        usable: list[tuple[_Asked, list[tuple[TokenGroup, int]]]] = []
        for ask in asked:
            branches = []
            for number in ask.groups:
                group, candidate = found[number]
                if isinstance(group, EncodeError):
                    _settle(ask.future, PolarError(f"{ask.name}: {group}"))
                    break
                branches.append((group, candidate))
            else:
                usable.append((ask, branches))
        scored = [group for group in encoded if isinstance(group, TokenGroup)]

        def settle_all(done: Future[list[list[float]]]) -> None:
            try:
                rewards = dict(zip(map(id, scored), done.result(), strict=True))
            except BaseException as error:  # a cancellation as well: nobody may wait for ever
                for ask, _ in usable:
                    _settle(ask.future, error)
                return
            for ask, branches in usable:
                score = self._combine([rewards[id(group)][candidate] for group, candidate in branches])
                truncated = any(group.cut.of(candidate) for group, candidate in branches)
                reward = Reward(score, True, truncated, len(ask.answer))
                self._deliver(ask.future, ask.sample, ask.answer, reward)

        self.client.submit_encoded(scored).add_done_callback(settle_all)

    def _deliver(self, future: Future[Reward], sample: TextGroup, answer: str | None, reward: Reward) -> None:
        if self._watch is not None:
            try:
                self._watch.add(reward.score, answer, sample.reference, reward.truncated)
            except OSError as error:  # costs no reward
                LOGGER.warning("%s: cannot be written (%s)", self._watch.file, first_line(error))
        _settle(future, reward)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A sample under way: its answer, and the numbers of its groups, one for each reference."""

    sample: TextGroup
    answer: str
    future: Future[Reward]
    groups: range

    @property
    def name(self) -> str:
        return f"sample with the prompt that begins {self.sample.prompt[:40]!r}"


def _settle(future: Future[Reward], outcome: Reward | BaseException) -> None:
    if not future.set_running_or_notify_cancel():
        return  # whoever asked has gone
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def sample_of(prompt: Any, references: Sequence[Any], output: Any) -> TextGroup:
    """A sample of a framework: prompt, references and the policy's output as texts or lists of messages.

    Args:
        prompt: The question, without a chat template.
        references: At least one reference answer.
        output: What the policy wrote.

    Raises:
        RowError: A field is neither a text nor a list of messages, or there is no reference; names it.

    >>> sample = sample_of([{"role": "user", "content": "2 + 2?"}], ["4", "IV"], "four")
    >>> sample.prompt, sample.references, sample.candidates
    ('2 + 2?', ('4', 'IV'), ('four',))
    """
    if not references:
        raise RowError("references", "is empty — POLAR compares an output with a reference: give one a row")
    groups = [
        parse_score_row({"prompt": prompt, "reference": reference, "output": output})
        for reference in references
    ]
    return replace(groups[0], references=tuple(group.reference for group in groups))


def sample_of_label(label: Any, output: str) -> TextGroup:
    """A sample of a framework that hands over the value of a row's label column and the policy's output.

    Args:
        label: ``{"prompt": …, "reference": …}``, or ``"references"`` with a list.
        output: What the policy wrote.

    Raises:
        RowError: The label says something else; names what is missing.

    >>> sample_of_label({"prompt": "2 + 2?", "reference": "4"}, "four").references
    ('4',)
    """
    if not isinstance(label, Mapping) or "prompt" not in label:
        raise RowError(
            "label", 'must be {"prompt": …, "reference": …} — question and reference reach the reward there'
        )
    references = label.get("references") or [label.get("reference")]
    return sample_of(label["prompt"], references, output)


def measured_floor(model: str | os.PathLike[str]) -> float:
    """The reward of an output without an answer, below what answers get: 1st percentile minus deviation.

    A floor at 0 would be a reward: the zero of a reward model means nothing, and an empty text can score
    higher than wrong answers.

    Args:
        model: A model folder with the scale that ``polar-ft calibrate`` measured.

    Raises:
        PolarError: Nothing was measured.
    """
    try:
        return RewardScale.load(model).floor
    except PolarError as error:
        raise PolarError(
            f"{model}: an output without an answer needs a reward, and {FILE_NAME} says of none; run "
            f"polar-ft calibrate {model} DATA, or give floor=…, below what wrong answers get"
        ) from error


@lru_cache
def _shared(settings: tuple[tuple[str, Any], ...]) -> PolarReward:
    return PolarReward(**dict(settings))


def shared_reward(settings: Mapping[str, Any]) -> PolarReward:
    """The `PolarReward` of these settings, one for all calls in this process.

    Args:
        settings: Keyword arguments of `PolarReward`, as frameworks hand them to a reward function; lists may
            be of any sequence type, such as omegaconf's.

    Raises:
        PolarError: ``model`` is missing, or a name is unknown.
    """
    known = list(signature(PolarReward).parameters)
    unknown = [name for name in settings if name not in known]
    if unknown or "model" not in settings:
        problem = f"{unknown[0]} is unknown" if unknown else "model is missing"
        raise PolarError(f"settings of the reward: {problem}; they may say {', '.join(known)}")
    return _shared(tuple(sorted((name, _hashable(value)) for name, value in settings.items())))


def _hashable(value: Any) -> Any:
    return value if isinstance(value, str) or not isinstance(value, Sequence) else tuple(value)
