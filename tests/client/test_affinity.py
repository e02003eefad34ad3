"""Candidates of a (prompt, reference) go to one server, as long as it is there and not overloaded."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_ft.client.errors import UnavailableError
from polar_ft.client.servers import Endpoint, Pending, ServerPool, preference
from tests.client.conftest import make_data
from tests.client.fake_server import FakeServer
from tests.client.test_client import expected

URLS = [f"http://gpu-{number}:30000" for number in range(4)]
HEADS = [str(number).encode() for number in range(1000)]


def pool_of(n: int, concurrency: int = 4) -> ServerPool:
    servers = [Endpoint(url, url) for url in URLS[:n]]
    return ServerPool(servers, concurrency=concurrency, retry_delay=0.01)


def test_servers_have_equal_shares():
    """250 of 1000, with a deviation of √(1000 · 1/4 · 3/4) = 14."""
    counts = Counter(preference(head, URLS)[0] for head in HEADS)
    assert all(abs(counts[number] - 250) < 4 * 14 for number in range(4))


def test_a_server_that_is_gone_moves_only_its_share_and_to_all_others():
    moved_to = Counter()
    for head in HEADS:
        before = [URLS[index] for index in preference(head, URLS)]
        after = [URLS[:3][index] for index in preference(head, URLS[:3])]
        assert after == [url for url in before if url != URLS[3]]
        if before[0] == URLS[3]:
            moved_to[after[0]] += 1
    assert set(moved_to) == set(URLS[:3])


@settings(deadline=None, max_examples=100)
@given(requests=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 50)), min_size=1, max_size=40))
def test_no_load_is_above_the_bound(requests):
    """Before the last request of a server was assigned, it had less than 1.25 times the mean."""

    async def enter() -> ServerPool:
        pool = pool_of(4)
        for first, tokens in requests:
            pool.enter([(first + i) % 4 for i in range(4)], tokens)
        return pool

    pool = asyncio.run(enter())
    total = sum(tokens for _, tokens in requests)
    most = 1.25 * total / 4 + max(tokens for _, tokens in requests)
    assert sum(server.tokens for server in pool.servers) == total
    assert all(server.tokens <= most for server in pool.servers)


async def work(pool: ServerPool, pending: Pending, seconds: dict[str, float]) -> str:
    server = await pool.acquire(pending, asyncio.get_running_loop().time() + 60)
    await asyncio.sleep(seconds[server.url])
    pool.answered(server)
    pool.release(server)
    pool.leave(pending)
    return server.url


def test_a_slow_server_is_relieved():
    """All thirty prefer it. It works on four; the others take the rest, and leave it nothing to wait for."""
    seconds = {URLS[0]: 0.5, URLS[1]: 0.005, URLS[2]: 0.005}

    async def run() -> tuple[list[str], ServerPool]:
        pool = pool_of(3)
        requests = [pool.enter([0, 1, 2], 10) for _ in range(30)]
        loads = [server.tokens for server in pool.servers]
        # 1.25 · 300 / 3 = 125, reached by the thirteenth at the latest.
        assert 40 <= loads[0] <= 130
        return await asyncio.gather(*(work(pool, pending, seconds) for pending in requests)), pool

    started = time.monotonic()
    done, pool = asyncio.run(run())
    assert Counter(done)[URLS[0]] == 4
    assert len(done) == 30
    assert time.monotonic() - started < 2
    assert [(server.tokens, server.requests) for server in pool.servers] == [(0, 0)] * 3


def test_requests_of_a_failed_server_do_not_wait_for_it_and_come_back():
    async def run() -> None:
        pool = pool_of(2, concurrency=1)
        first, waiting = pool.enter([0, 1], 10), pool.enter([0, 1], 1)
        give_up_at = asyncio.get_running_loop().time() + 60
        server = await pool.acquire(first, give_up_at)
        assert server.url == URLS[0]
        pool.failed(server, UnavailableError("reset"), asyncio.get_running_loop().time())
        pool.release(server)
        assert (await pool.acquire(waiting, give_up_at)).url == URLS[1]
        await asyncio.sleep(0.05)  # its pause is over: one request probes it
        assert (await pool.acquire(first, give_up_at)).url == URLS[0]
        assert pool.enter([0, 1], 1).server is pool.servers[1]
        pool.answered(server)
        assert pool.enter([0, 1], 1).server is not None
        pool.leave(first)
        pool.leave(waiting)
        assert pool.enter([0, 1], 1).server is pool.servers[0]

    asyncio.run(run())


def heads_of(sequences: Iterable[Sequence[int]], separator: int) -> set[tuple[int, ...]]:
    return {tuple(ids[: ids.index(separator)]) for ids in sequences}


def homes_of(servers: Sequence[FakeServer], separator: int) -> dict[tuple[int, ...], set[int]]:
    """For each (prompt, reference) the servers that scored candidates of it since the last call."""
    homes = defaultdict(set)
    for number, server in enumerate(servers):
        for head in heads_of(server.scored, separator):
            homes[head].add(number)
        server.scored.clear()
    return homes


def test_one_server_for_each_prefix_over_requests_and_clients(serve, connect, template):
    """Candidates of 20 prefixes, asked for one by one and together, by three clients, in any order."""
    servers = [serve(engine) for engine in ("sglang", "vllm", "lmdeploy")]
    data = make_data(60)
    right = expected(template, data)
    first = connect(*servers)
    for row, reward in zip(data, right, strict=True):
        assert first([row]) == [reward]
    homes = homes_of(servers, template.separator_id)
    assert len(homes) == 20
    assert all(len(home) == 1 for home in homes.values())
    assert len(set.union(*homes.values())) > 1

    second = connect(*reversed(servers))
    for start in range(57, -1, -3):
        assert second(data[start : start + 3]) == right[start : start + 3]
    assert homes_of(servers, template.separator_id) == homes
    # Together, those that prefer the same two servers are one request, which one server takes.
    third = connect(*servers)
    of_two = defaultdict(list)
    for row in data[::-1]:
        ids = third.encode(row).array
        head = ids[: template.head_length(ids)].tobytes()
        of_two[tuple(preference(head, [f"http://{server.address}" for server in servers])[:2])].append(row)
    for rows in of_two.values():
        assert third(rows) == expected(template, rows)
    assert homes_of(servers, template.separator_id) == homes
    assert sum(server.n_requests for server in servers) == 60 + 20 + len(of_two)


def test_the_share_of_a_dead_server_moves_and_comes_back(serve, connect, template):
    servers = [serve("sglang") for _ in range(3)]
    data = make_data(90)
    right = expected(template, data)
    client = connect(*servers, max_retries=50)

    def ask() -> dict[tuple[int, ...], set[int]]:
        for start in range(0, 90, 3):
            assert client(data[start : start + 3]) == right[start : start + 3]
        return homes_of(servers, template.separator_id)

    before = ask()
    servers[1].stop()
    without = ask()
    assert {head: home for head, home in without.items() if before[head] != {1}} == {
        head: home for head, home in before.items() if home != {1}
    }
    moved = [home for head, home in without.items() if before[head] == {1}]
    assert moved
    assert all(home in ({0}, {2}) for home in moved)
    servers[1] = serve("sglang", port=servers[1].port)
    end = time.monotonic() + 20
    while (again := ask()) != before:  # its pause has an end
        assert time.monotonic() < end, (before, again)


def test_an_overloaded_server_is_relieved(serve, connect, template):
    """The home of all rows answers one request at a time, slowly; the other one takes most of them."""
    servers = [serve("sglang"), serve("sglang")]
    data = [{"prompt": "The only question?", "reference": "r", "output": f"Answer {i}"} for i in range(60)]
    right = expected(template, data)
    client = connect(*servers, tokens_per_request=200, concurrency=1, timeout=30.0)
    client(data[:1])
    home = next(server for server in servers if server.scored)
    other = next(server for server in servers if server is not home)
    home.fault = lambda number, rewards: time.sleep(0.3)
    started = time.monotonic()
    assert client(data) == right
    assert len(other.scored) > 40
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("n", [1, 2, 5])
def test_order_of_rewards(serve, connect, template, n):
    data = make_data(300)[::-1]
    client = connect(*[serve("vllm") for _ in range(n)], tokens_per_request=700)
    assert client(data) == expected(template, data)


def test_requests_of_a_server_that_hangs_fail_with_its_first_contact(serve, connect, template):
    """Eight are assigned to it before it is known; each would wait for a time-out of its own."""
    hangs = FakeServer("sglang")
    asked = 0

    def models() -> dict[str, Any]:
        nonlocal asked
        asked += 1
        time.sleep(1.0)
        return {}

    hangs.models = models
    data = make_data(60)
    client = connect(hangs, serve("sglang"), tokens_per_request=200, timeout=0.3, retry_delay=5.0)
    try:
        assert client(data) == expected(template, data)
    finally:
        hangs.stop()
    assert asked == 1
