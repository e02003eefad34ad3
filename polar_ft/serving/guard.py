"""Checks before a request is handled: host, API key, number and size of requests."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
import time
import uuid
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polar_ft.serving.connections import Connections
from polar_ft.serving.limits import SLOWEST_BODY, Claim, InUse, Limits, overloaded
from polar_ft.serving.telemetry import Metrics, log, note

PLAYGROUND = Path(__file__).with_name("playground.html")

OPEN_ROUTE = "/health"

# First parts of a path that name the engine that a client expects; all routes also exist below them.
ENGINES = ("sglang", "vllm", "lmdeploy")

# nginx's status for logs and metrics; nobody reads the answer.
CLIENT_GONE = 499


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
    415: "unsupported_media_type",
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
        in_use: What all requests use of them.
        connections: The open connections.
        metrics: Metrics that count the requests.
        api_key: Key that every route except /health requires; None requires none.
        loopback_only: Refuse requests to a host name other than this machine's. Otherwise a web page that is
            open in a browser here could reach the server by a name that it resolves to 127.0.0.1.
        page: The page at /, which is also shown to those who have not given the key yet.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        in_use: InUse,
        connections: Connections,
        metrics: Metrics,
        api_key: str | None,
        loopback_only: bool,
        page: Path = PLAYGROUND,
    ) -> None:
        self.app = app
        self.limits = limits
        self.in_use = in_use
        self.connections = connections
        self.metrics = metrics
        self._key = api_key.encode() if api_key else None
        self.loopback_only = loopback_only
        self.page = page

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
                if self.connections.is_reserved(scope["client"]):
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            await self._handle(scope, receive, noting_send)
        except ClientDisconnect:
            pass
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
        claim = Claim(self.in_use, self.limits)
        scope["polar_ft"] = {}
        scope["polar_ft.claim"] = claim
        if scope["path"] != OPEN_ROUTE and self.connections.is_reserved(scope["client"]):
            # Its body is not read: it would keep a place that is for /health.
            answer = error_response(503, "too many connections are open; try again", {"Retry-After": "1"})
            await answer(scope, receive, send)
            return
        if not _within(headers.get(b"content-length"), self.limits.body_bytes):
            await self._too_large()(scope, receive, send)
            return
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            # The body is read to its end, else the client would see a closed connection instead of the
            # answer.
            try:
                await _drain(self._limited(receive, None))
            except HTTPException:
                refusal.headers["Connection"] = "close"
            await refusal(scope, receive, send)
            return
        try:
            await self.app(scope, self._limited(receive, claim if scope["method"] == "POST" else None), send)
        finally:
            claim.give_back()

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> Response | None:
        """The answer to a request that is refused by its header; None if it is not."""
        if self.loopback_only and not _names_loopback(headers.get(b"host", b"")):
            return error_response(
                421,
                "only requests to localhost are answered; give the server a key, or --allow-unauthenticated",
            )
        if not self._may(scope["path"], headers.get(b"authorization", b"")):
            return self._unauthorized(scope)
        if scope["method"] == "POST" and self.in_use.requests >= self.limits.max_requests:
            error = overloaded(f"{self.in_use.requests} requests are waiting; try again")
            return error_response(error.status_code, error.detail, dict(error.headers or {}))
        return None

    def _may(self, path: str, authorization: bytes) -> bool:
        if self._key is None or path == OPEN_ROUTE:
            return True
        scheme, _, given = authorization.partition(b" ")
        return hmac.compare_digest(given.strip(), self._key) and scheme.lower() == b"bearer"

    def _unauthorized(self, scope: Scope) -> Response:
        headers = {"WWW-Authenticate": "Bearer"}
        if scope["path"] == "/" and scope["method"] == "GET":
            # The page shows nothing of the model, and it is where a person enters the key.
            return html_page(self.page, 401, headers)
        return error_response(401, "send the API key as Authorization: Bearer KEY", headers)

    def _too_large(self) -> Response:
        return error_response(
            413, f"the body has more than {self.limits.body_bytes} bytes; send fewer inputs at once"
        )

    def _limited(self, receive: Receive, claim: Claim | None) -> Receive:
        """Wraps ``receive`` with the limits of size and time of the body, and claims what it takes."""
        size, complete = 0, False
        started = time.monotonic()

        async def limited() -> Message:
            nonlocal size, complete
            if complete:  # the next message is that the client disconnects
                return await receive()
            deadline = started + self.limits.read_timeout + size / SLOWEST_BODY
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                seconds = time.monotonic() - started
                raise HTTPException(
                    408, f"the body is too slow: {size} bytes in {seconds:.0f} s", {"Connection": "close"}
                ) from None
            part = len(message.get("body", b""))
            size += part
            if size > self.limits.body_bytes:
                raise HTTPException(413, f"the body has more than {self.limits.body_bytes} bytes")
            complete = not message.get("more_body", False)
            if claim is not None:
                claim.take_memory(part)
                if complete:
                    claim.take_place()
            return message

        return limited


_READ_HEADERS = {b"host", b"authorization", b"content-length"}


def playground() -> HTMLResponse:
    """Makes the response of the playground."""
    return html_page(PLAYGROUND)


def html_page(page: Path, status: int = 200, headers: dict[str, str] | None = None) -> HTMLResponse:
    """Makes the response of a page; its headers allow connections only to this server."""
    return HTMLResponse(page.read_text(encoding="utf-8"), status, {**_PAGE_HEADERS, **(headers or {})})


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
