"""Errors of reward servers."""

from __future__ import annotations

from polar_ft.errors import PolarError


class RewardServerError(PolarError):
    """A server did not answer, refused the request, or answered with something other than its rewards.

    Attributes:
        server: The server's address, as the user gave it; several addresses, joined by ", ", where all
            failed.
        reason: What happened, and what to do.
        status: HTTP status of the answer; None where there was no answer, or its content was wrong.
    """

    def __init__(self, server: str, reason: str, status: int | None = None) -> None:
        super().__init__(f"{server}: {reason}")
        self.server = server
        self.reason = reason
        self.status = status

    def __reduce__(self) -> tuple[type[RewardServerError], tuple[str, str, int | None]]:
        # Errors are pickled between processes (Ray, multiprocessing), which rebuilds them from these
        # arguments.
        return type(self), (self.server, self.reason, self.status)


class UnavailableError(Exception):
    """A server cannot answer now; the same request may succeed later or at another server.

    Attributes:
        reason: What happened.
        retry_after: Seconds after which the server asks to be tried again; None where it does not say.
        busy: The server works but is overloaded (HTTP 429).
    """

    def __init__(self, reason: str, retry_after: float | None = None, busy: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after = retry_after
        self.busy = busy


class WireError(Exception):
    """An answer does not have the wire format; the message says what came."""
