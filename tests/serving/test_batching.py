"""The queue: what is batched with what, and that everyone gets their own rewards."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_ft.groups import TokenGroup
from polar_ft.serving.batching import Batcher, Candidate, Job, QueueFullError, ScoringError, ShuttingDownError

POISON, NAN = 666, 999


class FakeModel:
    """The reward of a sequence is a hash of its ids that depends on their order; can be held."""

    def __init__(self, held: bool = False) -> None:
        self.batches: list[list[list[list[int]]]] = []
        self.begun, self.go = threading.Event(), threading.Event()
        if not held:
            self.go.set()

    def score_groups(self, groups: Sequence[TokenGroup]) -> list[list[float]]:
        self.begun.set()
        assert self.go.wait(30)
        whole = [
            [[*group.prefix.tolist(), *branch.tolist()] for branch in group.branches] for group in groups
        ]
        self.batches.append(whole)
        if any(POISON in ids for group in whole for ids in group):
            raise RuntimeError("out of memory")
        return [[reward(ids) for ids in group] for group in whole]


def reward(ids: Sequence[int]) -> float:
    return float("nan") if NAN in ids else float(sum((place + 1) * i for place, i in enumerate(ids)))


def candidate(head: Sequence[int], tail: Sequence[int]) -> Candidate:
    return Candidate(np.array([*head, *tail], dtype=np.int32), len(head))


def start(model: FakeModel, tokens_per_batch: int = 15, max_tokens: int = 10_000) -> Batcher:
    return Batcher(model, tokens_per_batch=tokens_per_batch, max_tokens=max_tokens)


def ask(batcher: Batcher, *candidates: Candidate) -> Future:
    job = Job(candidates)
    batcher.submit(job)
    return job.future


def test_the_drawing_of_the_module():
    """Heads of 1 token and tails of 4, no two alike: a candidate costs 5, another of the same head 4 more.

    In 15 tokens fit A1 A2 A3 (13; with A4 17), then B1 C1 A4 (15).
    """
    model = FakeModel(held=True)
    batcher = start(model)
    first = ask(batcher, candidate([1], [1, 1, 1, 1]))  # keeps the model busy while the others arrive
    assert model.begun.wait(10)
    a, b, c = 50, 60, 70
    order = [(a, 1), (b, 1), (a, 2), (c, 1), (a, 3), (a, 4)]
    futures = [ask(batcher, candidate([head], [number, 8, 8, head])) for head, number in order]
    model.go.set()
    assert first.result(10) == [15.0]  # 1·1 + 2·1 + 3·1 + 4·1 + 5·1
    for (head, number), future in zip(order, futures, strict=True):
        assert future.result(10) == [reward([head, number, 8, 8, head])]
    batcher.close()
    heads = [[[ids[0] for ids in group] for group in batch] for batch in model.batches]
    assert heads == [[[1]], [[a, a, a]], [[b], [c], [a]]]


def test_prefixes_that_tails_share_are_computed_once():
    """Ten tails of 9 tokens, 8 of them the same: 1 + 8 + 10 tokens fit into 20, though flat they are 100."""
    model = FakeModel(held=True)
    batcher = start(model, tokens_per_batch=20)
    first = ask(batcher, candidate([1], [1]))
    assert model.begun.wait(10)
    prompt = [7] * 8
    futures = [ask(batcher, candidate([5], [*prompt, number])) for number in range(10)]
    model.go.set()
    assert [future.result(10) for future in futures] == [[reward([5, *prompt, n])] for n in range(10)]
    assert first.result(10)
    batcher.close()
    assert [sum(map(len, batch)) for batch in model.batches] == [1, 10]


def test_a_group_that_is_still_arriving_is_computed_once():
    """A1 A2 B1 B2 wait while B3 is on its way; a lone C1 is not waited for, nor is a last head."""
    model = FakeModel(held=True)
    batcher = start(model, tokens_per_batch=100)
    futures = [ask(batcher, candidate([1], [1]))]
    assert model.begun.wait(10)
    a, b, c = 50, 60, 70
    futures += [ask(batcher, candidate([head], [n])) for head, n in [(a, 1), (a, 2), (b, 1), (b, 2)]]
    model.begun.clear()
    second = model.go
    model.go = threading.Event()  # the next forward is held again
    second.set()
    assert model.begun.wait(10)
    futures += [ask(batcher, candidate([head], [n])) for head, n in [(b, 3), (c, 1)]]
    model.go.set()
    for future in futures:
        future.result(10)
    batcher.close()
    heads = [[[ids[0] for ids in group] for group in batch] for batch in model.batches]
    assert heads == [[[1]], [[a, a]], [[b, b, b], [c]]]


def test_a_stream_of_one_head_starves_nobody():
    model = FakeModel(held=True)
    batcher = start(model, tokens_per_batch=9)
    ask(batcher, candidate([1], [1, 1, 1, 1]))
    assert model.begun.wait(10)
    crowd = [ask(batcher, candidate([50], [n, 8, 8, 8])) for n in range(3)]
    lonely = ask(batcher, candidate([60], [1, 8, 8, 8]))
    crowd += [ask(batcher, candidate([50], [n, 8, 8, 8])) for n in range(3, 20)]
    model.go.set()
    for future in [lonely, *crowd]:
        future.result(10)
    batcher.close()
    # Two of a head a batch: 0 and 1, then 2 with 3, then it is the oldest.
    firsts = [batch[0][0][0] for batch in model.batches]
    assert firsts.index(60) == 3


@settings(max_examples=40, deadline=None)
@given(
    jobs=st.lists(
        st.lists(
            st.tuples(
                st.lists(st.integers(1, 3), max_size=3), st.lists(st.integers(1, 3), min_size=1, max_size=6)
            ),
            min_size=1,
            max_size=5,
        ),
        min_size=1,
        max_size=12,
    ),
    tokens_per_batch=st.integers(1, 30),
)
def test_everyone_gets_their_own_rewards_in_order(jobs, tokens_per_batch):
    model = FakeModel()
    batcher = start(model, tokens_per_batch)
    with ThreadPoolExecutor(4) as clients:
        futures = list(clients.map(lambda job: ask(batcher, *(candidate(h, t) for h, t in job)), jobs))
    for job, future in zip(jobs, futures, strict=True):
        assert future.result(10) == [reward([*head, *tail]) for head, tail in job]
    batcher.close()
    assert batcher.waiting_tokens == 0


def test_what_is_cancelled_is_not_computed_and_makes_room():
    model = FakeModel(held=True)
    batcher = start(model, max_tokens=10)
    first = ask(batcher, candidate([1], [1, 1, 1, 1]))
    assert model.begun.wait(10)
    gone = ask(batcher, candidate([2], [2, 2, 2, 2]))
    assert batcher.waiting_tokens == 10
    with pytest.raises(QueueFullError):
        ask(batcher, candidate([3], [3]))
    gone.cancel()
    assert batcher.waiting_tokens == 5
    last = ask(batcher, candidate([3], [3]))
    model.go.set()
    assert first.result(10)
    assert last.result(10) == [reward([3, 3])]
    batcher.close()
    assert not any(2 in ids for batch in model.batches for group in batch for ids in group)


def test_a_full_queue_says_when_to_come_again():
    model = FakeModel(held=True)
    batcher = start(model, max_tokens=5)
    ask(batcher, candidate([1], [1, 1, 1, 1]))
    with pytest.raises(QueueFullError) as full:
        ask(batcher, candidate([2], [2]))
    assert full.value.retry_after >= 1
    model.go.set()
    batcher.close()


@pytest.mark.parametrize("bad", [POISON, NAN])
def test_one_request_does_not_spoil_those_of_others(bad):
    model = FakeModel(held=True)
    batcher = start(model, tokens_per_batch=100)
    ask(batcher, candidate([1], [1]))
    assert model.begun.wait(10)
    futures = [
        ask(batcher, candidate([2], [5]), candidate([3], [6])),
        ask(batcher, candidate([2], [bad])),
        ask(batcher, candidate([2], [7])),
    ]
    model.go.set()
    assert futures[0].result(10) == [reward([2, 5]), reward([3, 6])]
    with pytest.raises(ScoringError):
        futures[1].result(10)
    assert futures[2].result(10) == [reward([2, 7])]
    assert ask(batcher, candidate([4], [4])).result(10) == [reward([4, 4])]  # and the thread lives
    batcher.close()


def test_closing_answers_what_was_taken():
    model = FakeModel(held=True)
    batcher = start(model, tokens_per_batch=5)
    futures = [ask(batcher, candidate([n], [n, n])) for n in range(1, 8)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    while batcher.alive:
        pass
    with pytest.raises(ShuttingDownError):
        ask(batcher, candidate([1], [1]))
    model.go.set()
    closing.join(10)
    assert [future.result(0) for future in futures] == [[reward([n, n, n])] for n in range(1, 8)]
