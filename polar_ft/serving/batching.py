"""Scores requests of many clients together: a queue, and one thread that runs the model.

The unit of the queue is a candidate; its head is the beginning that all candidates of a (prompt, reference)
share. Whenever the model is free, it takes the candidate that has waited longest, then the others with the
same head, of any client, then candidates with other heads, until the batch is full. Candidates with one head
are computed as a tree (`polar_ft.groups`). The model does not wait for a batch to fill. But where several
heads wait, the newest one is left for the next batch if it has several candidates: more of them may be
about to arrive, and the prefix would have to be computed twice.

Oldest first, where letters are heads and a batch holds three candidates::

    queue    A1  B1  A2  C1  A3  A4                arrival from left to right
    batches  [A1 A2 A3]  [B1 C1 A4]

Every batch begins with the oldest candidate, so a stream of candidates with one head cannot starve the
others, and no head is left for the next batch twice.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from polar_ft.groups import TokenGroup, common_prefix_length

# Weight of the newest batch in the running mean of tokens per second.
_NEW = 0.2


class GroupScorer(Protocol):
    """The model: `polar_ft.scoring.scorer.RewardScorer`."""

    def score_groups(self, groups: Sequence[TokenGroup]) -> list[list[float]]:
        """Scores each branch of each group."""


class QueueFullError(Exception):
    """The queue has no room now.

    Attributes:
        retry_after: Seconds until there may be room.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class ShuttingDownError(Exception):
    """The server accepts no new requests."""


class ScoringError(Exception):
    """The model raised an error, or gave a reward that is not a finite number."""


@dataclass(frozen=True)
class Candidate:
    """One sequence of token ids in the queue.

    Attributes:
        ids: From BOS to the reward token, int32 array [tokens].
        head_length: Number of tokens that candidates of one (prompt, reference) share, up to and including
            the separator; 0 where there is no separator.
    """

    ids: np.ndarray
    head_length: int

    @property
    def head(self) -> bytes:
        """The shared tokens as bytes: equal for candidates of one (prompt, reference)."""
        return self.ids[: self.head_length].tobytes()


class _Tree:
    """Counts the tokens of candidates with one head as a tree."""

    def __init__(self) -> None:
        self.tokens = 0
        self._first: np.ndarray | None = None
        self._shared = self._members = self._all_tokens = 0

    def add(self, candidate: Candidate) -> None:
        """Adds a candidate."""
        if self._first is None:
            self._first, self._shared = candidate.ids, len(candidate.ids)
        self._shared = min(self._shared, common_prefix_length([self._first, candidate.ids]))
        self._members += 1
        self._all_tokens += len(candidate.ids)
        self.tokens = self._all_tokens - (self._members - 1) * self._shared


class Job:
    """The candidates of one request.

    Attributes:
        tokens: Tokens of their trees, which count for the limit of the queue.
        future: Gets the rewards in the order of the candidates. Cancelling it removes the job from the queue.
    """

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self.candidates = candidates
        self.heads = [candidate.head for candidate in candidates]
        trees: dict[bytes, _Tree] = {}
        for head, candidate in zip(self.heads, candidates, strict=True):
            trees.setdefault(head, _Tree()).add(candidate)
        self.tokens = sum(tree.tokens for tree in trees.values())
        self.future: Future[list[float]] = Future()
        self._rewards: list[float | None] = [None] * len(candidates)
        self._missing = len(candidates)

    def put(self, index: int, reward: float) -> None:
        """Notes the reward of a candidate; the last one answers the request."""
        self._rewards[index] = reward
        self._missing -= 1
        if not self._missing:
            finite = all(reward is not None and math.isfinite(reward) for reward in self._rewards)
            if finite:
                self._finish(lambda: self.future.set_result(self._rewards))  # type: ignore[arg-type]
            else:
                self.fail(ScoringError("the model gave a reward that is not a finite number"))

    def fail(self, error: Exception) -> None:
        """Answers the request with an error."""
        self._finish(lambda: self.future.set_exception(error))

    def _finish(self, answer: Callable[[], None]) -> None:
        with suppress(InvalidStateError):  # the client has disconnected
            answer()


@dataclass(order=True)
class _Waiting:
    """A candidate in the queue; ordered by arrival."""

    arrival: int
    job: Job = field(compare=False)
    index: int = field(compare=False)

    @property
    def candidate(self) -> Candidate:
        return self.job.candidates[self.index]


@dataclass(frozen=True)
class BatchInfo:
    """Counts of one forward, for metrics."""

    candidates: int
    jobs: int
    tokens: int
    sequence_tokens: int
    seconds: float


class Batcher:
    """The queue and its thread; see the top of the module.

    Args:
        scorer: The model.
        tokens_per_batch: Most tokens in a forward; a longer candidate runs alone.
        max_tokens: Most tokens that may wait.
        on_batch: Called from the thread after every forward.
        on_error: Called from the thread with an exception that the model raised.
    """

    def __init__(
        self,
        scorer: GroupScorer,
        *,
        tokens_per_batch: int,
        max_tokens: int,
        on_batch: Callable[[BatchInfo], None] = lambda info: None,
        on_error: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self.scorer = scorer
        self.tokens_per_batch = tokens_per_batch
        self.max_tokens = max_tokens
        self.on_batch = on_batch
        self.on_error = on_error
        self._changed = threading.Condition()
        self._queue: dict[bytes, list[_Waiting]] = {}
        self._arrivals = itertools.count()
        self._waiting_tokens = 0
        self._tokens_per_second: float | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="polar-ft model", daemon=True)
        self._thread.start()

    @property
    def waiting_tokens(self) -> int:
        """Tokens of requests that are not answered yet."""
        return self._waiting_tokens

    @property
    def alive(self) -> bool:
        """Whether requests are taken and answered."""
        return self._thread.is_alive() and not self._closing

    def submit(self, job: Job) -> None:
        """Puts a job into the queue; its future gets the rewards.

        Raises:
            QueueFullError: There is no room now; an empty queue accepts any job within ``max_tokens``.
            ShuttingDownError: The queue is closed.
        """
        with self._changed:
            if self._closing:
                raise ShuttingDownError
            if self._waiting_tokens + job.tokens > self.max_tokens:
                raise QueueFullError(self._retry_after())
            self._waiting_tokens += job.tokens
            arrival = next(self._arrivals)
            for index, head in enumerate(job.heads):
                self._queue.setdefault(head, []).append(_Waiting(arrival, job, index))
            self._changed.notify()
        # Called at once if the client has already disconnected; else by the thread that ends the future.
        job.future.add_done_callback(lambda _: self._release(job))

    def close(self, timeout: float | None = None) -> None:
        """Accepts nothing new, answers what was accepted, and ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)

    def _release(self, job: Job) -> None:
        with self._changed:
            self._waiting_tokens -= job.tokens

    def _retry_after(self) -> int:
        if not self._tokens_per_second:
            return 1
        return min(60, max(1, math.ceil(self._waiting_tokens / self._tokens_per_second)))

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closing:
                    self._changed.wait()
                if not self._queue:
                    return
                batch = self._take()
            if batch:
                self._score(batch)

    def _take(self) -> list[list[_Waiting]]:
        """Takes the next batch from the queue, grouped by head; removes cancelled candidates.

        The oldest head fills the batch as far as possible. Other heads are added only if all their candidates
        fit: the prefix of a head that is divided has to be computed twice.
        """
        batch: list[list[_Waiting]] = []
        room = self.tokens_per_batch
        heads = sorted(self._queue, key=lambda head: self._queue[head][0])
        if len(heads) > 1 and len(self._queue[heads[-1]]) > 1:
            heads.pop()  # more of it may be about to arrive; for the next batch it is not the newest
        for head in heads:
            waiting = [one for one in self._queue[head] if not one.job.future.done()]
            if batch and waiting and waiting[0].candidate.head_length > room:
                continue
            tree = _Tree()
            taken = 0
            while taken < len(waiting):
                tree.add(waiting[taken].candidate)
                if tree.tokens > room and (batch or taken):
                    break
                taken += 1
            if taken < len(waiting) and batch:
                continue
            if taken:
                batch.append(waiting[:taken])
                room -= tree.tokens
            if taken < len(waiting):
                self._queue[head] = waiting[taken:]
                break
            del self._queue[head]
            if room <= 0:
                break
        return batch

    def _score(self, batch: list[list[_Waiting]]) -> None:
        jobs = {id(waiting.job): waiting.job for members in batch for waiting in members}
        started = time.perf_counter()
        try:
            groups = [TokenGroup.of_sequences([one.candidate.ids for one in members]) for members in batch]
            rewards = self.scorer.score_groups(groups)
        except Exception as error:
            if len(jobs) > 1:  # a request that fails must not affect the others
                for job in jobs.values():
                    own = ([waiting for waiting in members if waiting.job is job] for members in batch)
                    self._score([members for members in own if members])
            else:
                self.on_error(error)
                for job in jobs.values():
                    job.fail(ScoringError("the model failed on this input"))
            return
        seconds = time.perf_counter() - started
        tokens = sum(group.tree_tokens() for group in groups)
        self._note_speed(tokens / max(seconds, 1e-6))
        # Before the requests are answered, so that a client that then reads the metrics finds its request
        # there.
        sequence_tokens = sum(len(waiting.candidate.ids) for members in batch for waiting in members)
        self.on_batch(BatchInfo(sum(map(len, batch)), len(jobs), tokens, sequence_tokens, seconds))
        for members, values in zip(batch, rewards, strict=True):
            for waiting, reward in zip(members, values, strict=True):
                waiting.job.put(waiting.index, reward)

    def _note_speed(self, tokens_per_second: float) -> None:
        before = self._tokens_per_second
        self._tokens_per_second = (
            tokens_per_second if before is None else (1 - _NEW) * before + _NEW * tokens_per_second
        )
