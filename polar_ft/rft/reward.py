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
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from inspect import signature
from statistics import fmean
from typing import Any, Literal, cast, get_args
from weakref import WeakKeyDictionary

from polar_ft.client.client import RewardModelClient
from polar_ft.client.contact import ServerType
from polar_ft.data.answers import Thinking
from polar_ft.data.records import RowError
from polar_ft.data.score_rows import parse_score_row
from polar_ft.errors import PolarError
from polar_ft.files import first_line
from polar_ft.groups import TextGroup, TokenGroup, against, merge_texts
from polar_ft.rft.rules import MathRule, Rule, Verdict
from polar_ft.rft.shaping import Normalise, measured_floor, measured_rule_rewards, normalised, shaping_of
from polar_ft.rft.watch import RewardWatch
from polar_ft.template import EncodeError

LOGGER = logging.getLogger("polar_ft.rft")


@dataclass(frozen=True, slots=True)
class Sample(TextGroup):
    """A `TextGroup` of one candidate, the policy's output, that may ask for a rule.

    Attributes:
        rule: How its reward is found: None by the reward model, "math" by comparing final answers.
    """

    rule: Rule | None = None


@dataclass(frozen=True, slots=True)
class Reward:
    """The reward of one output.

    Attributes:
        score: What the policy gets: ``raw`` after shaping.
        raw: The reward model's reward, or the rule's, or the floor if there was no answer.
        answered: Whether there was an answer to score.
        truncated: Whether prompt, reference or answer was cut to the model's length limits.
        overlong: Whether the answer is longer than ``max_characters``.
        length: Characters of the answer.
        verdict: Of the rule, for samples that ask for one and have an answer.
    """

    score: float
    raw: float
    answered: bool
    truncated: bool
    overlong: bool
    length: int
    verdict: Verdict | None = None

    def as_row(self) -> dict[str, float]:
        """All figures as numbers under fixed keys, as frameworks log them.

        ``by_rule`` is 1 where the rule gave the reward, ``rule_right`` where it found the answer right, and
        ``rule_failed`` where it could not read the reference or did not finish.

        >>> Reward(-0.5, -1.5, answered=True, truncated=False, overlong=False, length=12).as_row()
        ... # doctest: +NORMALIZE_WHITESPACE
        {'score': -0.5, 'raw': -1.5, 'answered': 1.0, 'truncated': 0.0, 'overlong': 0.0, 'length': 12.0,
         'by_rule': 0.0, 'rule_right': 0.0, 'rule_failed': 0.0}
        """
        return {
            "score": self.score,
            "raw": self.raw,
            "answered": float(self.answered),
            "truncated": float(self.truncated),
            "overlong": float(self.overlong),
            "length": float(self.length),
            "by_rule": float(self.verdict in ("right", "wrong", "failed")),
            "rule_right": float(self.verdict == "right"),
            "rule_failed": float(self.verdict in ("failed", "no gold")),
        }


class PolarReward:
    """Rewards of a policy's outputs from one or several servers that run a POLAR model.

    Args:
        model: Folder of the reward model, or a hub id; only tokenizer and settings are read.
        server_address: ``host:port`` or a URL, or several of them.
        server_type: As in `RewardModelClient`.
        api_key: As in `RewardModelClient`.
        allow_tokenizer_code: As in `RewardModelClient`; the published folders need
            ["tokenization_internlm2_fast.InternLM2TokenizerFast"].
        timeout: Seconds that one request may take in total.
        max_wait: Seconds for which a request waits for servers that are away or busy. A server that is
            restarted costs a training run time and nothing else, so it is long.
        floor: The reward of an output without an answer; None takes that of `measured_floor`.
        references: With several references the reward is the greatest of those against each of them
            ("max"), or their mean.
        think_start: Opening tag of thoughts; an empty text if the policy has none.
        think_end: Closing tag.
        think_in_prompt: Whether the prompt template ends with the opening tag; see `Thinking`.
        clip: Lowest and highest reward that the reward model may give; or 1, 5 or 25 for the measured
            quantiles at so many percent from both ends. The floor and the rewards of rules are not clipped.
        temperature: Divides rewards; "measured" takes the scale's, which makes them logits of preference.
        centre: Subtracted from rewards before; "measured" takes the scale's mean.
        max_characters: Length of an answer from which the penalty is full; None for no penalty.
        overlong_buffer: Characters before that over which it rises from 0; see `overlong_share`.
        overlong_penalty: The full penalty, subtracted after the temperature.
        rule_rewards: What a rule gives (right, wrong), on the reward model's scale; None takes the measured
            quantiles at 95 and 5 %.
        rule_seconds: Seconds that a rule may take for one answer; then the answer is wrong, and counted.
        normalise: "group" makes (reward − mean) / deviation within the samples of one (prompt, references) of
            a batch, "batch" over the batch; both need a framework that hands over batches.
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
        allow_tokenizer_code: Sequence[str] = (),
        timeout: float = 120.0,
        max_wait: float = 1800.0,
        floor: float | None = None,
        references: Literal["max", "mean"] = "max",
        think_start: str = "<think>",
        think_end: str = "</think>",
        think_in_prompt: bool = False,
        clip: Sequence[float] | float | None = None,
        temperature: float | Literal["measured"] | None = None,
        centre: float | Literal["measured"] | None = None,
        max_characters: int | None = None,
        overlong_buffer: int = 0,
        overlong_penalty: float = 1.0,
        rule_rewards: Sequence[float] | None = None,
        rule_seconds: float = 10.0,
        normalise: Normalise = "none",
        gather_ms: float = 5.0,
        watch: str | os.PathLike[str] | None = None,
        watch_every: int = 256,
    ) -> None:
        if references not in ("max", "mean"):
            raise PolarError(f"references={references!r}: must be 'max' or 'mean'")
        if normalise not in get_args(Normalise):
            raise PolarError(f"normalise={normalise!r}: must be 'none', 'group' or 'batch'")
        if bool(think_start) != bool(think_end):
            raise PolarError("think_start and think_end: give both tags, or two empty texts for none")
        if think_in_prompt and not think_start:
            raise PolarError("think_in_prompt: has no effect without tags; give think_start and think_end")
        if not rule_seconds > 0:
            raise PolarError(f"rule_seconds={rule_seconds!r}: must be a number greater than 0")
        self.floor = measured_floor(model) if floor is None else float(floor)
        self.thinking = Thinking(think_start, think_end, think_in_prompt) if think_start else None
        self.shaping = shaping_of(
            model,
            floor=self.floor,
            clip=clip,
            temperature=temperature,
            centre=centre,
            max_characters=max_characters,
            overlong_buffer=overlong_buffer,
            overlong_penalty=overlong_penalty,
        )
        if rule_rewards is not None:  # measured ones are read when a row asks for them
            if isinstance(rule_rewards, str) or len(rule_rewards) != 2:
                raise PolarError(f"rule_rewards={rule_rewards!r}: must be two numbers (right, wrong)")
            self._check_rule_rewards(*rule_rewards)
        self.normalise: Normalise = normalise
        self.client = RewardModelClient(
            model,
            server_address=server_address,
            server_type=server_type,
            api_key=api_key,
            allow_tokenizer_code=allow_tokenizer_code,
            timeout=timeout,
            max_wait=max_wait,
            # `max_wait` alone says how long a server may be away.
            max_retries=10**6,
        )
        self._model = model
        self._combine: Callable[[list[float]], float] = max if references == "max" else fmean
        self._rule_rewards = rule_rewards
        self._rule_seconds = rule_seconds
        self._math: _MathRewards | None = None
        self._watch = RewardWatch(watch, watch_every) if watch is not None else None
        self._gather_seconds = gather_ms / 1000
        self._lock = threading.Lock()
        self._waiting: list[_Ask] = []
        self._inboxes: WeakKeyDictionary[asyncio.AbstractEventLoop, _Inbox] = WeakKeyDictionary()

    def score(self, samples: Sequence[TextGroup]) -> list[Reward]:
        """Scores a batch; rewards come in its order.

        Args:
            samples: Each with one candidate, the policy's output, thoughts included. With
                ``normalise="group"`` those of one prompt with the same references are a group.

        Raises:
            PolarError: A sample cannot be encoded; the message names it.
            RewardServerError: No server answered within ``max_wait`` seconds, or one did not give rewards.
        """
        futures: list[Future[Reward]] = [Future() for _ in samples]
        self._send([_Ask(sample, future) for sample, future in zip(samples, futures, strict=True)])
        rewards = [future.result() for future in futures]
        if self.normalise == "none" or not rewards:
            return rewards
        groups = [(s.prompt, s.references) for s in samples] if self.normalise == "group" else None
        if groups is not None and len(set(groups)) == len(groups):
            LOGGER.warning("normalise='group': no prompt has several samples, so every reward becomes 0")
        scores = normalised([reward.score for reward in rewards], groups)
        rewards = [replace(reward, score=score) for reward, score in zip(rewards, scores, strict=True)]
        for sample, reward in zip(samples, rewards, strict=True):
            self._add_to_watch(reward, *self._read(sample))
        return rewards

    async def score_async(self, sample: TextGroup) -> Reward:
        """Scores one sample, from a coroutine; what other coroutines and threads ask for is sent with it.

        Raises:
            PolarError: As in `score` and `submit`.
        """
        self.check_single_calls("a caller that submits single samples")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Reward] = loop.create_future()
        with self._lock:
            inbox = self._inboxes.get(loop) or self._inboxes.setdefault(loop, _Inbox(loop))
        self._gather(_Ask(sample, future, inbox))
        return await future

    def submit(self, sample: TextGroup) -> Future[Reward]:
        """Starts scoring one sample; what is submitted within ``gather_ms`` is sent together.

        Raises:
            PolarError: ``normalise`` is set, which needs batches.
        """
        self.check_single_calls("a caller that submits single samples")
        future: Future[Reward] = Future()
        self._gather(_Ask(sample, future))
        return future

    def check_single_calls(self, framework: str) -> None:
        """Refuses to normalise where samples come one at a time; for adapters to call when they are made.

        Args:
            framework: Named in the error.

        Raises:
            PolarError: ``normalise`` is set.
        """
        if self.normalise != "none":
            raise PolarError(
                f"normalise={self.normalise!r} needs whole batches, and {framework} asks for one sample at a "
                f"time; leave it out (GRPO and RLOO normalise within groups themselves)"
            )

    def close(self) -> None:
        """Closes the connections and ends the processes of rules; the next call starts them again."""
        self.client.close()
        with self._lock:
            math, self._math = self._math, None
        if math is not None:
            math.rule.close()

    def _gather(self, ask: _Ask) -> None:
        with self._lock:
            self._waiting.append(ask)
            first = len(self._waiting) == 1
        if first:
            timer = threading.Timer(self._gather_seconds, self._send_waiting)
            timer.daemon = True
            try:
                timer.start()
            except RuntimeError:  # no thread can be started: a limit of the system, or the process ends
                self._send_waiting()

    def _send_waiting(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        try:
            self._send(waiting)
        except BaseException as error:  # in a timer's thread nobody else would learn of it
            for ask in waiting:
                if not ask.future.done():
                    _settle(ask, error)

    def _send(self, asks: Sequence[_Ask]) -> None:
        """Sorts samples by what gives their rewards: the floor, a rule or the reward model."""
        scored: list[_Scored] = []
        for ask in asks:
            try:
                answer, references = self._read(ask.sample)
                if answer is None:
                    self._deliver(ask, None, references, self.floor)
                elif isinstance(ask.sample, Sample) and ask.sample.rule and ask.verdict is None:
                    self._ask_rule(ask, answer, references)
                else:
                    scored.append(_Scored(ask, answer, references))
            except PolarError as error:
                _settle(ask, error)
        self._ask_servers(scored)

    def _read(self, sample: TextGroup) -> tuple[str | None, tuple[str, ...]]:
        """Answer and references without thoughts; the answer is None if none came."""
        (output,) = sample.candidates
        if self.thinking is None:
            return output.strip() or None, sample.references
        try:
            return self.thinking.answer(output), tuple(map(self.thinking.reference, sample.references))
        except PolarError as error:
            raise PolarError(f"{_name(sample)}: {error}") from None

    def _ask_rule(self, ask: _Ask, answer: str, references: tuple[str, ...]) -> None:
        with self._lock:
            if self._math is None:
                right, wrong = self._rule_rewards or measured_rule_rewards(self._model)
                self._check_rule_rewards(right, wrong)
                self._math = _MathRewards(MathRule(self._rule_seconds), right, wrong)
            rewards = self._math

        def settle(done: Future[Verdict]) -> None:
            try:
                ask.verdict = done.result()
                if ask.verdict == "no gold":  # the reward model can still compare
                    self._gather(ask)
                else:
                    raw = rewards.right if ask.verdict == "right" else rewards.wrong
                    self._deliver(ask, answer, references, raw)
            except BaseException as error:
                _settle(ask, error)

        rewards.rule.check(references, answer).add_done_callback(settle)

    def _check_rule_rewards(self, right: float, wrong: float) -> None:
        if not self.floor < wrong < right:
            raise PolarError(
                f"rule_rewards: right {right:g} must be above wrong {wrong:g}, and that above the floor "
                f"{self.floor:g} of outputs without an answer"
            )

    def _ask_servers(self, asked: Sequence[_Scored]) -> None:
        """Encodes samples and asks for their rewards; each future gets its own reward or an error."""
        groups: list[TextGroup] = []
        numbers: list[range] = []  # of the groups of each sample, one for each reference
        for one in asked:
            first = len(groups)
            for reference in one.references:
                groups.append(replace(against(one.ask.sample, reference), candidates=(one.answer,)))
            numbers.append(range(first, len(groups)))

        merged = merge_texts(groups)
        encoded = self.client.template.encode_each([texts.group for texts in merged])
        found = {
            number: (encoded[place], candidate)
            for place, texts in enumerate(merged)
            for number, (candidate,) in texts.members
        }
        usable: list[tuple[_Scored, list[tuple[TokenGroup, int]]]] = []
        for one, own in zip(asked, numbers, strict=True):
            branches = []
            for number in own:
                group, candidate = found[number]
                if isinstance(group, EncodeError):
                    _settle(one.ask, PolarError(f"{_name(one.ask.sample)}: {group}"))
                    break
                branches.append((group, candidate))
            else:
                usable.append((one, branches))
        sent = [group for group in encoded if isinstance(group, TokenGroup)]

        def settle_all(done: Future[list[list[float]]]) -> None:
            try:
                rewards = dict(zip(map(id, sent), done.result(), strict=True))
            except BaseException as error:  # a cancellation as well: nobody may wait for ever
                for one, _ in usable:
                    _settle(one.ask, error)
                return
            for one, branches in usable:
                try:
                    raw = self._combine([rewards[id(group)][candidate] for group, candidate in branches])
                    truncated = any(group.cut.of(candidate) for group, candidate in branches)
                    self._deliver(one.ask, one.answer, one.references, raw, truncated=truncated)
                except BaseException as error:
                    _settle(one.ask, error)

        self.client.submit_encoded(sent).add_done_callback(settle_all)

    def _deliver(
        self, ask: _Ask, answer: str | None, references: Sequence[str], raw: float, *, truncated: bool = False
    ) -> None:
        length = len(answer or "")
        by_model = answer is not None and ask.verdict in (None, "no gold")
        reward = Reward(
            score=self.shaping.score(raw, length, clip=by_model),
            raw=raw,
            answered=answer is not None,
            truncated=truncated,
            overlong=self.shaping.overlong(length),
            length=length,
            verdict=ask.verdict,
        )
        if self.normalise == "none":  # otherwise when the batch is complete
            self._add_to_watch(reward, answer, references)
        _settle(ask, reward)

    def _add_to_watch(self, reward: Reward, answer: str | None, references: Sequence[str]) -> None:
        if self._watch is None:
            return
        try:
            self._watch.add(
                reward.score,
                answer,
                references,
                raw=reward.raw,
                truncated=reward.truncated,
                overlong=reward.overlong,
                verdict=reward.verdict,
            )
        except OSError as error:  # costs no reward
            LOGGER.warning("%s: cannot be written (%s)", self._watch.file, first_line(error))


@dataclass(slots=True)
class _Ask:
    """A sample under way, and the verdict of its rule once there is one.

    Its future is an event loop's if there is an inbox, through which alone other threads may settle it.
    """

    sample: TextGroup
    future: Future[Reward] | asyncio.Future[Reward]
    inbox: _Inbox | None = None
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True)
class _Scored:
    """A sample whose reward comes from the reward model, without thoughts."""

    ask: _Ask
    answer: str
    references: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _MathRewards:
    rule: MathRule
    right: float
    wrong: float


def _name(sample: TextGroup) -> str:
    return f"sample with the prompt that begins {sample.prompt[:40]!r}"


class _Inbox:
    """Hands outcomes over to an event loop: what comes together with one wake-up, which is a system call.

    Args:
        loop: The loop of the futures.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)  # the inboxes are kept by loop, weakly
        self._lock = threading.Lock()
        self._outcomes: list[tuple[asyncio.Future[Reward], Reward | BaseException]] = []

    def put(self, future: asyncio.Future[Reward], outcome: Reward | BaseException) -> None:
        """Settles a future of the loop soon; called from any thread."""
        with self._lock:
            self._outcomes.append((future, outcome))
            first = len(self._outcomes) == 1
        if first and (loop := self._loop()) is not None:
            with suppress(RuntimeError):  # the loop is closed: whoever asked has gone
                loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            outcomes, self._outcomes = self._outcomes, []
        for future, outcome in outcomes:
            if future.done():
                continue  # whoever asked has gone
            if isinstance(outcome, BaseException):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)


def _settle(ask: _Ask, outcome: Reward | BaseException) -> None:
    future = ask.future
    if ask.inbox is not None:
        ask.inbox.put(cast("asyncio.Future[Reward]", future), outcome)
        return
    future = cast("Future[Reward]", future)
    if not future.set_running_or_notify_cancel():
        return  # whoever asked has gone
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def sample_of(prompt: Any, references: Sequence[Any], output: Any, rule: str | None = None) -> Sample:
    """A sample of a framework: prompt, references and the policy's output as texts or lists of messages.

    Args:
        prompt: The question, without a chat template.
        references: At least one reference answer.
        output: What the policy wrote.
        rule: "math" for a reward by comparing final answers; None or an empty text for the reward model's.

    Raises:
        RowError: A field is neither a text nor a list of messages, there is no reference, or the rule is
            unknown; names it.

    >>> sample = sample_of([{"role": "user", "content": "2 + 2?"}], ["4", "IV"], "four")
    >>> sample.prompt, sample.references, sample.candidates, sample.rule
    ('2 + 2?', ('4', 'IV'), ('four',), None)
    """
    if not references:
        raise RowError("references", "is empty — POLAR compares an output with a reference: give one a row")
    if rule and rule not in get_args(Rule):
        raise RowError("rule", f'is {rule!r}; must be "math", or empty for the reward model\'s reward')
    groups = [
        parse_score_row({"prompt": prompt, "reference": reference, "output": output})
        for reference in references
    ]
    return Sample(
        prompt=groups[0].prompt,
        references=tuple(group.reference for group in groups),
        candidates=groups[0].candidates,
        rule="math" if rule else None,
    )


def sample_of_label(label: Any, output: str) -> Sample:
    """A sample of a framework that hands over the value of a row's label column and the policy's output.

    Args:
        label: ``{"prompt": …, "reference": …}``, or ``"references"`` with a list; ``"rule"`` as in
            `sample_of` if the row asks for one.
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
    return sample_of(label["prompt"], references, output, label.get("rule"))


@lru_cache
def _shared(settings: tuple[tuple[str, Any], ...]) -> PolarReward:
    given = dict(settings)
    known = list(signature(PolarReward).parameters)
    unknown = [name for name in given if name not in known]
    if unknown or "model" not in given:
        problem = f"{unknown[0]} is unknown" if unknown else "model is missing"
        raise PolarError(f"settings of the reward: {problem}; they may say {', '.join(known)}")
    return PolarReward(**given)


def shared_reward(settings: Mapping[str, Any]) -> PolarReward:
    """The `PolarReward` of these settings, one for all calls in this process.

    Args:
        settings: Keyword arguments of `PolarReward`, as frameworks hand them to a reward function; lists may
            be of any sequence type, such as omegaconf's.

    Raises:
        PolarError: ``model`` is missing, or a name is unknown.
    """
    # Called for every sample, so the settings are checked only when they are new.
    return _shared(tuple(sorted((name, _hashable(value)) for name, value in settings.items())))


def _hashable(value: Any) -> Any:
    return value if isinstance(value, str) or not isinstance(value, Sequence) else tuple(value)
