"""The servers of a client: their addresses, which one gets the next request, and which ones pause.

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
from urllib.parse import urlsplit

import httpx

from polar_ft.client.contact import Profile
from polar_ft.client.errors import RewardServerError, UnavailableError
from polar_ft.errors import PolarError

LOGGER = logging.getLogger("polar_ft.client")

# Longest pause of a server that failed, in seconds.
LONGEST_PAUSE = 30.0


@dataclass(eq=False)
class Endpoint:
    """One server and its state.

    Attributes:
        name: The address as the user gave it; used in errors.
        url: Prefix of its routes, without a slash at the end.
        profile: What is known of it; None before the first contact and after a failure.
        contact: Held while it is being contacted.
        requests: Requests that it is working on.
        tokens: Tokens of those requests.
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


class ServerPool:
    """Chooses a server for each request, the least busy first; a server that failed pauses.

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
        self._changed = asyncio.Event()

    @property
    def names(self) -> str:
        """Names of all servers, for errors."""
        return ", ".join(server.name for server in self.servers)

    async def acquire(self, tokens: int, give_up_at: float) -> Endpoint:
        """Waits for a free server and takes it for a request; `release` gives it back.

        Args:
            tokens: Tokens of the request.
            give_up_at: Time until which to wait for servers that pause.

        Raises:
            RewardServerError: All servers pause for longer than that.
        """
        loop = asyncio.get_running_loop()
        while True:
            now = loop.time()
            awake = [server for server in self.servers if server.rests_until <= now]
            free = [server for server in awake if server.requests < self._limit(server)]
            if free:
                server = min(free, key=lambda server: (server.tokens, server.requests))
                server.requests += 1
                server.tokens += tokens
                return server
            wakes = min((s.rests_until for s in self.servers if s.rests_until > now), default=None)
            if not awake and wakes is not None and wakes > give_up_at:
                raise RewardServerError(self.names, f"gave up waiting; {self.reasons()}")
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), None if wakes is None else wakes - now)

    def release(self, server: Endpoint, tokens: int) -> None:
        """Gives a server back when its request has ended, in whatever way."""
        server.requests -= 1
        server.tokens -= tokens
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

    def _limit(self, server: Endpoint) -> int:
        return 1 if server.failures else self.concurrency

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
