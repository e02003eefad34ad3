"""The HTTP server: uvicorn, with bounds on connections and a time-out for headers.

uvicorn bounds neither: a client that opens connections and sends half a header keeps them for ever, until the
process has no file descriptor left. `uvicorn.Config` takes the class that handles a connection, so the bounds
are in a subclass of uvicorn's own.

At the bound a new connection takes the place of the one that has waited longest without a request. If all are
busy it gets one of a few reserved places, where `polar_ft.serving.guard.Guard` answers only /health. So
whoever asks for /health gets an answer, however many connections stand open.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from polar_ft.serving.limits import Limits
from polar_ft.serving.telemetry import Metrics

# Connections beyond the bound, for /health.
RESERVED = 16

# Connections that are accepted before the loop looks at them; each takes a file descriptor.
ACCEPTED_AT_ONCE = 16

# Connections that wait to be accepted, in the kernel.
BACKLOG = 2048

# File descriptors that the process needs apart from connections: logs, files, threads.
OTHER_FILES = 24

# Seconds for the header on a reserved place.
RESERVED_SECONDS = 2.0

# For the rest of a body whose request is answered already: seconds between two parts, of up to 256 kB, and
# seconds in all.
PAUSE_SECONDS = 0.01
REST_SECONDS = 60.0

# Seconds for which a connection stays open between two requests: longer than clients keep one, so that no
# client sends on a connection that is just being closed.
KEEP_ALIVE_SECONDS = 75


class Connections:
    """The open connections of a server.

    Args:
        limits: How many there may be, and how long a header may take.
        metrics: Counts those that were ended.

    Attributes:
        limit: How many there may be; fewer than asked for where the process may not open as many files.
    """

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self.limit = min(limits.max_connections, _free_files() - RESERVED - 2 * ACCEPTED_AT_ONCE)
        self.limit = max(1, self.limit)
        self.per_address = min(limits.max_connections_per_address or self.limit, self.limit)
        self.read_timeout = limits.read_timeout
        self.metrics = metrics
        self._of_address: Counter[str] = Counter()
        # Without a request, the longest first; all, and by address.
        self._waiting: dict[Connection, None] = {}
        self._waiting_of: dict[str, dict[Connection, None]] = {}
        self._reserved: dict[Connection, None] = {}

    @property
    def count(self) -> int:
        """Number of open connections, the reserved ones left out."""
        return self._of_address.total()

    def is_reserved(self, client: tuple[str, int] | None) -> bool:
        """Whether the connection from an address and port is one of those for /health."""
        return any(connection.client == client for connection in self._reserved)

    def add(self, connection: Connection) -> bool:
        """Adds a new connection; returns False if it has a reserved place."""
        address = connection.address
        full_address = self._of_address[address] >= self.per_address
        if full_address or self.count >= self.limit:
            waiting = self._waiting_of.get(address, {}) if full_address else self._waiting
            if not waiting:
                if len(self._reserved) >= RESERVED:
                    next(iter(self._reserved)).end("no place")
                self._reserved[connection] = None
                return False
            next(iter(waiting)).end("gave its place")
        self._of_address[address] += 1
        self.note(connection, waits=True)
        return True

    def remove(self, connection: Connection) -> None:
        """Removes a connection; one that was removed before is left alone."""
        if connection in self._reserved:
            del self._reserved[connection]
        elif not connection.ended:
            self.note(connection, waits=False)
            self._of_address[connection.address] -= 1
            if not self._of_address[connection.address]:
                del self._of_address[connection.address]
        connection.ended = True

    def note(self, connection: Connection, *, waits: bool) -> None:
        """Notes whether a connection waits for a request or has one."""
        if connection in self._reserved or connection.ended:
            return
        of_address = self._waiting_of.setdefault(connection.address, {})
        if waits and connection not in self._waiting:
            self._waiting[connection] = of_address[connection] = None
        elif not waits:
            self._waiting.pop(connection, None)
            of_address.pop(connection, None)
        if not of_address:
            del self._waiting_of[connection.address]


class Connection(H11Protocol):
    """One connection.

    Args:
        connections: All connections of the server.
        **uvicorn_arguments: What uvicorn gives to the class that handles a connection.

    Attributes:
        address: The client's address.
        ended: Whether it is no longer counted.
    """

    def __init__(self, connections: Connections, **uvicorn_arguments: Any) -> None:
        super().__init__(**uvicorn_arguments)
        self._all = connections
        self._header_timer: asyncio.TimerHandle | None = None
        self._seconds = connections.read_timeout
        self.address = ""
        self.ended = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Adds the connection; the time for its first header begins."""
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        if not self._all.add(self):
            self._seconds = min(self._seconds, RESERVED_SECONDS)
        self._start_timer(self._seconds)

    def data_received(self, data: bytes) -> None:
        """Reads; the time for a header runs from its first byte."""
        super().data_received(data)
        self._note_state()
        if not self._waits:
            return
        if self.conn.their_state is h11.SEND_BODY:
            # The request is answered already. The rest of its body is thrown away, but not at full speed,
            # which would cost the others time; closing at once would keep the client from the answer.
            self.transport.pause_reading()
            self.loop.call_later(PAUSE_SECONDS, self._read_on)
            if self._header_timer is None:
                self._start_timer(REST_SECONDS)
        elif self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self._stop_timer()  # that was all of it
        elif self._header_timer is None:
            self._start_timer(self._seconds)

    def on_response_complete(self) -> None:
        """Notes that the connection waits for the next request."""
        super().on_response_complete()
        self._note_state()

    def connection_lost(self, exc: Exception | None) -> None:
        """Removes the connection."""
        self._stop_timer()
        self._all.remove(self)
        super().connection_lost(exc)

    def end(self, reason: str) -> None:
        """Closes the connection at once, for a reason of the metrics."""
        self._stop_timer()
        self._all.remove(self)
        self._all.metrics.connections_ended.labels(reason).inc()
        self.transport.abort()

    def _read_on(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    @property
    def _waits(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _note_state(self) -> None:
        if not self._waits:
            self._stop_timer()
        self._all.note(self, waits=self._waits)

    def _start_timer(self, seconds: float) -> None:
        self._header_timer = self.loop.call_later(seconds, self.end, "slow header")

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None


class HttpServer(uvicorn.Server):
    """Serves an application of `polar_ft.serving.app.create_app`.

    Args:
        app: The application.
        port: The port for a server without sockets of its own; 0 takes a free one.
    """

    def __init__(self, app: FastAPI, port: int = 0) -> None:
        limits: Limits = app.state.server.limits
        protocol = partial(Connection, app.state.server.connections)
        super().__init__(
            uvicorn.Config(
                app,
                port=port,
                http=cast(type[asyncio.Protocol], protocol),
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=ACCEPTED_AT_ONCE,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(limits.timeout) + 1,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts listening."""
        await super().startup(sockets)
        # asyncio accepts as many connections at once as its backlog, before it looks at the first. The kernel
        # may hold more.
        for server in self.servers:
            for listening in server.sockets:
                with socket.socket(fileno=os.dup(listening.fileno())) as same:
                    same.listen(BACKLOG)


def _free_files() -> int:
    """How many more files the process may open; the soft limit is raised to the hard one."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard == resource.RLIM_INFINITY or hard > soft:
            wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
            soft = max(soft, wanted)
        folder = Path("/proc/self/fd")
        used = len(list(folder.iterdir())) if folder.is_dir() else 64
        return soft - used - OTHER_FILES
    return 256  # Windows
