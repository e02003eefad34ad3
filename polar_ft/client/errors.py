"""What a reward server can do wrong, as an error that names it."""

from __future__ import annotations

from polar_ft.errors import PolarError


class RewardServerError(PolarError):
    """A server did not answer, refused, or answered something that is not the rewards asked for.

    Attributes:
        server: The server's address, as the user gave it; several, joined by ", ", where all of them failed.
        reason: What it did, and what to do.
        status: HTTP status of its answer, None where there was none or the answer itself was wrong.
    """

    def __init__(self, server: str, reason: str, status: int | None = None) -> None:
        super().__init__(f"{server}: {reason}")
        self.server = server
        self.reason = reason
        self.status = status

    def __reduce__(self) -> tuple[type[RewardServerError], tuple[str, str, int | None]]:
        # Errors cross process borders (Ray, multiprocessing): an exception is rebuilt from its arguments.
        return type(self), (self.server, self.reason, self.status)


class UnavailableError(Exception):
    """A server cannot answer now; the same request may succeed elsewhere or later.

    Attributes:
        reason: What happened.
        retry_after: Seconds after which the server asks to be tried again, None where it does not say.
        busy: The server is well and has too much to do (429).
    """

    def __init__(self, reason: str, retry_after: float | None = None, busy: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after = retry_after
        self.busy = busy


class WireError(Exception):
    """An answer is not what the wire format says; the message tells what came."""
