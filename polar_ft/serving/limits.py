"""Limits on what the server accepts, and what is in use of them."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import HTTPException

# Candidates in one request; each takes about a kilobyte in addition to its tokens.
MAX_CANDIDATES = 16384

# Bytes of a body for each token that a request may have: an id and its comma take as much in JSON, and text
# takes less.
BYTES_PER_TOKEN = 8

# Bytes of one text for each token that the model reads. Text takes about four; what takes more than sixteen
# is refused, as it would be tokenized only to be cut to a small part of itself.
TEXT_BYTES_PER_TOKEN = 16

# Bytes a second that a body must come with, after the first seconds.
SLOWEST_BODY = 65536


@dataclass(frozen=True)
class Limits:
    """Limits on what the server accepts at a time.

    Attributes:
        max_body: Most bytes of a request; None for what ``max_request_tokens`` can need.
        max_requests: Most requests that wait for their rewards; whose body is still coming does not count.
        max_request_tokens: Most tokens of all sequences of a request, shared beginnings counted each time.
        max_queue_tokens: Most tokens to compute that wait; also the most that one request may have.
        max_memory: Most bytes of all bodies and token ids that are held.
        max_connections: Most open connections.
        max_connections_per_address: Most open connections of one address; None for all of them.
        read_timeout: Seconds for the header of a request, and for its body in addition to a second for each
            64 kB of it.
        timeout: Seconds for answering a request.
    """

    max_body: int | None = None
    max_requests: int = 1024
    max_request_tokens: int = 2**20
    max_queue_tokens: int = 2**22
    max_memory: int = 2**28
    max_connections: int = 1024
    max_connections_per_address: int | None = None
    read_timeout: float = 10.0
    timeout: float = 600.0

    @property
    def body_bytes(self) -> int:
        """Most bytes of a request."""
        return BYTES_PER_TOKEN * self.max_request_tokens if self.max_body is None else self.max_body


@dataclass
class InUse:
    """What all requests together use.

    Attributes:
        requests: Requests whose body has arrived and that are not answered yet.
        memory: Bytes of bodies and token ids.
    """

    requests: int = 0
    memory: int = 0


class Claim:
    """What one request uses; given back when it ends.

    Args:
        in_use: What all requests use.
        limits: How much that may be.
    """

    def __init__(self, in_use: InUse, limits: Limits) -> None:
        self._in_use = in_use
        self._limits = limits
        self._requests = self._memory = 0

    def take_memory(self, size: int) -> None:
        """Takes bytes for a part of the body, or for token ids.

        Raises:
            HTTPException: All requests together would hold too many.
        """
        if self._in_use.memory + size > self._limits.max_memory:
            raise overloaded("the requests that wait fill the server's memory; try again")
        self._in_use.memory += size
        self._memory += size

    def take_place(self) -> None:
        """Takes a place among the requests that wait for their rewards.

        Raises:
            HTTPException: There is none.
        """
        if self._in_use.requests >= self._limits.max_requests:
            raise overloaded(f"{self._in_use.requests} requests are waiting; try again")
        self._in_use.requests += 1
        self._requests += 1

    def give_back(self) -> None:
        """Gives everything back."""
        self._in_use.requests -= self._requests
        self._in_use.memory -= self._memory
        self._requests = self._memory = 0


def overloaded(message: str, retry_after: int = 1) -> HTTPException:
    """The answer to a request for which there is no room now."""
    return HTTPException(429, message, {"Retry-After": str(retry_after)})
