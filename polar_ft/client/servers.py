"""The servers of a client: their addresses, which one gets a request, and which ones pause.

Everything here runs in one event loop, so nothing needs a lock.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from urllib.parse import urlsplit

import httpx

from polar_ft.client.contact import Profile
from polar_ft.client.errors import RewardServerError, UnavailableError
from polar_ft.errors import PolarError

LOGGER = logging.getLogger("polar_ft.client")

# Longest pause of a server that failed, in seconds.
LONGEST_PAUSE = 30.0

# How many times the mean load a server may have; as in Apache bRPC's balancer of this kind.
LOAD_FACTOR = 1.25


@dataclass(eq=False)
class Endpoint:
    """One server and its state.

    Attributes:
        name: The address as the user gave it; used in errors.
        url: Prefix of its routes, without a slash at the end.
        profile: What is known of it; None before the first contact and after a failure.
        contact: Held while it is being contacted.
        requests: Requests that it is working on.
        tokens: Tokens of those requests, and of those that wait for it.
        answered_at: Time of its last answer; times are those of the event loop, in seconds.
        failures: Failures in a row.
        failed_at: Time of its last failure.
        rests_until: Time until which it gets no request.
        last_reason: Reason of its last failure.
    """

    name: str
    url: str
    profile: Profile | None = None
    contact: asyncio.Lock = field(default_factory=asyncio.Lock)
    requests: int = 0
    tokens: int = 0
    answered_at: float = -math.inf
    failures: int = 0
    failed_at: float = -math.inf
    rests_until: float = 0.0
    last_reason: str = ""


def parse_addresses(addresses: str | Sequence[str]) -> list[tuple[str, str]]:
    """Reads the addresses that a user gave.

    Args:
        addresses: ``host:port`` or a URL, or several of them: a sequence, or one string with commas.

    Returns:
        For each server its name, as given, and the prefix of its routes.

    Raises:
        PolarError: An address is not valid, or is given twice.

    >>> parse_addresses("127.0.0.1:30000, https://rm.example/v7/")
    [('127.0.0.1:30000', 'http://127.0.0.1:30000'), ('https://rm.example/v7/', 'https://rm.example/v7')]
    """
    given = addresses.split(",") if isinstance(addresses, str) else list(addresses)
    servers = [(name, _url(name)) for entry in given if (name := entry.strip())]
    if not servers:
        raise PolarError("server_address names no server; give host:port, or several")
    urls = [url for _, url in servers]
    for name, url in servers:
        if urls.count(url) > 1:
            raise PolarError(f"server_address names {name} twice")
    return servers


def _url(address: str) -> str:
    url = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        httpx.URL(url)
    except (ValueError, httpx.InvalidURL):
        valid = False
    if not valid or " " in address:
        raise PolarError(
            f"server_address: {address!r} is no address; write host:port, or http(s)://host:port"
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        # The address may contain a password, so the message does not repeat it.
        raise PolarError("server_address: write host:port alone; a key goes into api_key")
    return url.rstrip("/")


def preference(head: bytes, urls: Sequence[str]) -> list[int]:
    """Indices of servers in the order in which a (prompt, reference) prefers them, the same in every process.

    Rendezvous hashing (Thaler and Ravishankar 1998, doi 10.1109/90.663936): without a server, only what it
    was the first choice of gets another first choice, and that spreads over all others.

    Args:
        head: Bytes that identify the (prompt, reference).
        urls: The servers.

    >>> preference(b"2 + 2?", ["http://a:1", "http://b:1", "http://c:1"])
    [0, 1, 2]
    >>> preference(b"2 + 2?", ["http://c:1", "http://b:1"])  # b before c, as above
    [1, 0]
    """
    weights = [blake2b(url.encode(), key=blake2b(head, digest_size=16).digest()).digest() for url in urls]
    return sorted(range(len(urls)), key=weights.__getitem__, reverse=True)


@dataclass(eq=False)
class Pending:
    """One request that waits for a server, or that a server works on.

    Attributes:
        preference: The servers, the best one for its (prompt, reference) first.
        tokens: Its tokens.
        server: The server to which it is assigned.
        queued: Seconds that it waited for its turn at servers that work.
    """

    preference: Sequence[Endpoint]
    tokens: int
    server: Endpoint | None = None
    queued: float = 0.0


class ServerPool:
    """Assigns requests to servers; a server that failed pauses.

    A request goes to the first server that it prefers, so that all candidates of a (prompt, reference) find
    its prefix in the cache of one server. Loads are bounded (Mirrokni, Thorup and Zadimoghaddam, "Consistent
    Hashing with Bounded Loads", arXiv 1608.01350): a server with `LOAD_FACTOR` times the mean load or more,
    measured in tokens of the requests assigned to it, gets no further one, and requests that wait for it move
    to the next server that they prefer. They do so as well if another server has nothing to do.

    Args:
        servers: At least one.
        concurrency: Requests that a server works on at a time; after a failure one at a time, until it
            answers.
        retry_delay: Seconds that a server pauses after its first failure; doubled with every further one.
    """

    def __init__(self, servers: Sequence[Endpoint], *, concurrency: int, retry_delay: float) -> None:
        self.servers = list(servers)
        self.concurrency = concurrency
        self.retry_delay = retry_delay
        self._urls = [server.url for server in servers]
        self._changed = asyncio.Event()

    @property
    def names(self) -> str:
        """Names of all servers, for errors."""
        return ", ".join(server.name for server in self.servers)

    def preference(self, head: bytes) -> list[int]:
        """Indices of the servers in the order in which a (prompt, reference) prefers them."""
        return preference(head, self._urls) if len(self.servers) > 1 else [0]

    def enter(self, order: Sequence[int], tokens: int) -> Pending:
        """Notes a request, so that it counts as load; `leave` ends that.

        Args:
            order: The servers in the order of `preference`.
            tokens: Tokens of the request.
        """
        pending = Pending([self.servers[index] for index in order], tokens)
        self._assign(pending)
        return pending

    async def acquire(self, pending: Pending, give_up_at: float) -> Endpoint:
        """Waits until a server is free for a request and takes it; `release` gives it back.

        Args:
            pending: The request.
            give_up_at: Time until which to wait for servers that pause; later by the time for which it had
                to queue.

        Raises:
            RewardServerError: All servers pause for longer than that.
        """
        loop = asyncio.get_running_loop()
        while True:
            server = self._assign(pending)
            now = loop.time()
            awake = server.rests_until <= now
            if awake and server.requests < self._limit(server):
                server.requests += 1
                return server
            wakes = min((s.rests_until for s in self.servers if s.rests_until > now), default=None)
            give_up = give_up_at + pending.queued
            if wakes is not None and wakes > give_up and all(s.rests_until > now for s in self.servers):
                raise RewardServerError(self.names, f"gave up waiting; {self.reasons()}")
            one_works = any(not s.failures and s.rests_until <= now for s in self.servers)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), None if wakes is None else wakes - now)
            if one_works:
                pending.queued += loop.time() - now

    def release(self, server: Endpoint) -> None:
        """Gives a server back when its request has ended, in whatever way."""
        server.requests -= 1
        self._wake()

    def leave(self, pending: Pending) -> None:
        """Notes that a request needs no server any more."""
        if pending.server is not None:
            pending.server.tokens -= pending.tokens
            pending.server = None
            self._wake()

    def answered(self, server: Endpoint) -> None:
        """Notes that the server answered."""
        if server.failures:
            LOGGER.info("%s answers again", server.name)
        server.failures = 0
        server.answered_at = asyncio.get_running_loop().time()

    def failed(self, server: Endpoint, problem: UnavailableError, sent_at: float) -> None:
        """Notes that the server did not answer a request, and lets it pause.

        Args:
            server: The server.
            problem: What happened.
            sent_at: When the request was sent. Of requests that were in progress together only the first
                failure counts: a server that dies once has failed once.
        """
        now = asyncio.get_running_loop().time()
        server.last_reason = problem.reason
        if problem.busy:
            # An overloaded server works; it gets requests again when it asks for them.
            pause = self.retry_delay if problem.retry_after is None else problem.retry_after
            server.rests_until = max(server.rests_until, now + pause * random.uniform(1.0, 1.2))
            return
        # After a failure there may be another process, with another model or other flags.
        server.profile = None
        if sent_at <= server.failed_at:
            return
        server.failures += 1
        server.failed_at = now
        pause = self.retry_delay * 2 ** min(server.failures - 1, 20) * random.uniform(0.8, 1.2)
        pause = max(min(LONGEST_PAUSE, pause), problem.retry_after or 0.0)
        server.rests_until = now + pause
        LOGGER.log(
            # A server that is down for hours is reported once, not every half minute.
            logging.WARNING if server.failures == 1 else logging.INFO,
            "%s: %s; it is tried again in %.1f s%s",
            server.name,
            problem.reason,
            pause,
            "" if len(self.servers) == 1 else ", the other servers take its requests",
        )

    def reasons(self) -> str:
        """The last failure of every server that failed."""
        if len(self.servers) == 1:
            return self.servers[0].last_reason
        return "; ".join(f"{s.name}: {s.last_reason}" for s in self.servers if s.last_reason)

    def _assign(self, pending: Pending) -> Endpoint:
        """Assigns a request that waits to the first server that it prefers and whose load allows it."""
        now = asyncio.get_running_loop().time()
        # After a pause one request probes a server; the others do not wait for what becomes of it.
        usable = [
            server
            for server in pending.preference
            if server.rests_until <= now and not (server.failures and server.requests)
        ]
        before = pending.server
        if before is not None:
            before.tokens -= pending.tokens
        most = LOAD_FACTOR * (sum(server.tokens for server in usable) + pending.tokens) / max(1, len(usable))
        idle = any(not server.tokens for server in usable)
        allowed = (
            server
            for server in usable
            if server.tokens < most and (not idle or server.requests < self._limit(server))
        )
        server = next(allowed, before or pending.preference[0])
        server.tokens += pending.tokens
        pending.server = server
        return server

    def _limit(self, server: Endpoint) -> int:
        return 1 if server.failures else self.concurrency

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
