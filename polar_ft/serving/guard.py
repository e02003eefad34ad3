"""Checks before a request is handled: host, API key, number and size of requests."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polar_ft.serving.telemetry import Metrics, log, note

PLAYGROUND = Path(__file__).with_name("playground.html")

OPEN_ROUTE = "/health"

# First parts of a path that name the engine that a client expects; all routes also exist below them.
ENGINES = ("sglang", "vllm", "lmdeploy")

# nginx's status for logs and metrics; nobody reads the answer.
CLIENT_GONE = 499


@dataclass(frozen=True)
class Limits:
    """Limits on what the server accepts at a time.

    Attributes:
        max_body: Most bytes of a request.
        max_requests: Most requests that are being read or wait for their rewards.
        max_queue_tokens: Most tokens that wait; also the most that one request may have.
        timeout: Seconds for reading a request, and again for answering it.
    """

    max_body: int = 64 * 2**20
    max_requests: int = 1024
    max_queue_tokens: int = 2**22
    timeout: float = 600.0


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """Makes the response of an error; all errors have this form."""
    body = {"error": {"message": message, "type": _TYPES.get(status, "invalid_request"), "code": status}}
    return JSONResponse(body, status, headers)


_TYPES = {
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "too_large",
    421: "wrong_host",
    429: "overloaded",
    500: "internal_error",
    503: "unavailable",
    504: "timeout",
}


class Guard:
    """ASGI middleware that checks every request, logs it and counts it.

    Args:
        app: The application.
        limits: Limits on what is accepted at a time.
        metrics: Metrics that count the requests.
        in_flight: Counter of requests that are being read or answered.
        api_key: Key that every route except /health requires; None requires none.
        loopback_only: Refuse requests to a host name other than this machine's. Otherwise a web page that is
            open in a browser here could reach the server by a name that it resolves to 127.0.0.1.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        metrics: Metrics,
        in_flight: InFlight,
        api_key: str | None,
        loopback_only: bool,
    ) -> None:
        self.app = app
        self.limits = limits
        self.metrics = metrics
        self.in_flight = in_flight
        self._key = api_key.encode() if api_key else None
        self.loopback_only = loopback_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        engine, slash, rest = scope["path"][1:].partition("/")
        if slash and engine in ENGINES:
            scope = {**scope, "path": f"/{rest}", "polar_ft.engine": engine}
        started = time.perf_counter()
        request_id = uuid.uuid4().hex[:16]
        status = 0

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-request-id", request_id.encode()))
            await send(message)

        try:
            await self._handle(scope, receive, noting_send)
        except Exception as error:
            # Handled here, as uvicorn's own log would contain the message.
            log.error("failed", exc_info=error, extra={"fields": {"id": request_id}})
            if not status:
                await error_response(500, "the server failed; its log says where")(
                    scope, receive, noting_send
                )
        seconds = time.perf_counter() - started
        route = getattr(scope.get("route"), "path", "other")  # the path as sent may contain anything
        status = status or CLIENT_GONE
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        note(
            "request",
            id=request_id,
            route=route,
            status=status,
            ms=round(seconds * 1000, 1),
            **scope.get("polar_ft", {}),
        )

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name: value for name, value in scope["headers"] if name in _READ_HEADERS}
        scope["polar_ft"] = {}
        refusal: Response | None = None
        if self.loopback_only and not _names_loopback(headers.get(b"host", b"")):
            refusal = error_response(
                421,
                "only requests to localhost are answered; give the server a key, or --allow-unauthenticated",
            )
        elif not self._may(scope["path"], headers.get(b"authorization", b"")):
            refusal = self._unauthorized(scope)
        elif not _within(headers.get(b"content-length"), self.limits.max_body):
            await self._too_large()(scope, receive, send)
            return
        elif scope["method"] == "POST" and self.in_flight.count >= self.limits.max_requests:
            refusal = error_response(
                429, f"{self.in_flight.count} requests are waiting; try again", {"Retry-After": "1"}
            )
        limited = self._limited(receive)
        if refusal is not None:
            # The body is read to its end, else the client would see a closed connection instead of the
            # answer.
            try:
                await _drain(limited)
            except HTTPException:
                refusal.headers["Connection"] = "close"
            await refusal(scope, limited, send)
            return
        if scope["method"] != "POST":
            await self.app(scope, limited, send)
            return
        self.in_flight.count += 1
        try:
            await self.app(scope, limited, send)
        finally:
            self.in_flight.count -= 1

    def _may(self, path: str, authorization: bytes) -> bool:
        if self._key is None or path == OPEN_ROUTE:
            return True
        scheme, _, given = authorization.partition(b" ")
        return hmac.compare_digest(given.strip(), self._key) and scheme.lower() == b"bearer"

    def _unauthorized(self, scope: Scope) -> Response:
        headers = {"WWW-Authenticate": "Bearer"}
        if scope["path"] == "/" and scope["method"] == "GET":
            # The page shows nothing of the model, and it is where a person enters the key.
            return playground(401, headers)
        return error_response(401, "send the API key as Authorization: Bearer KEY", headers)

    def _too_large(self) -> Response:
        return error_response(
            413, f"the body has more than {self.limits.max_body} bytes; send fewer inputs at once"
        )

    def _limited(self, receive: Receive) -> Receive:
        """Wraps ``receive`` with the limits of size and time of the body."""
        size, complete = 0, False
        deadline = time.monotonic() + self.limits.timeout

        async def limited() -> Message:
            nonlocal size, complete
            if complete:  # the next message is that the client disconnects
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                raise HTTPException(408, f"the body did not come within {self.limits.timeout:g} s") from None
            size += len(message.get("body", b""))
            if size > self.limits.max_body:
                raise HTTPException(413, f"the body has more than {self.limits.max_body} bytes")
            complete = not message.get("more_body", False)
            return message

        return limited


@dataclass
class InFlight:
    """Number of requests that are being read or answered."""

    count: int = 0


_READ_HEADERS = {b"host", b"authorization", b"content-length"}


def playground(status: int = 200, headers: dict[str, str] | None = None) -> HTMLResponse:
    """Makes the response of the playground; its headers allow connections only to this server."""
    return HTMLResponse(PLAYGROUND.read_text(encoding="utf-8"), status, {**_PAGE_HEADERS, **(headers or {})})


_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def _names_loopback(host: bytes) -> bool:
    """Whether a Host header names this machine.

    >>> [_names_loopback(host) for host in (b"127.0.0.1:8000", b"[::1]:8000", b"localhost", b"127.0.0.1.x")]
    [True, True, True, False]
    """
    name = re.sub(r":\d+$", "", host.decode("latin-1").lower()).strip("[]")
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def _within(length: bytes | None, limit: int) -> bool:
    return length is None or (length.isdigit() and int(length) <= limit)


async def _drain(receive: Receive) -> None:
    while True:
        message: dict[str, Any] = dict(await receive())
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
