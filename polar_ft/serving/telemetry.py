"""JSON logs and Prometheus metrics for the operator; neither contains text of users."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections import Counter as Counts
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from polar_ft.serving.batching import BatchInfo

log = logging.getLogger("polar_ft.serving")

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKENS = (64, 256, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The metrics of one server, in their own registry.

    Args:
        waiting_tokens: Returns the number of tokens in the queue.
        in_flight: Returns the number of requests whose body has arrived and that are not answered yet.
        connections: Returns the number of open connections.
    """

    def __init__(
        self,
        waiting_tokens: Callable[[], int],
        in_flight: Callable[[], int],
        connections: Callable[[], int],
    ) -> None:
        self.registry = CollectorRegistry()
        make: dict[str, Any] = {"registry": self.registry, "namespace": "polar_ft"}
        self.requests = Counter(
            "requests", "Requests answered; 499: the client went away.", ["route", "status"], **make
        )
        self.seconds = Histogram(
            "request_seconds",
            "From the first byte of a request to its answer.",
            ["route"],
            buckets=_SECONDS,
            **make,
        )
        self.candidates = Counter("candidates", "Candidates scored.", **make)
        self.unanswered = Counter(
            "unanswered", "Outputs of policies without an answer, which got the floor.", ["route"], **make
        )
        self.tokens = Counter("computed_tokens", "Tokens computed; what sequences share counts once.", **make)
        self.sequence_tokens = Counter("sequence_tokens", "Tokens of all sequences, shared or not.", **make)
        self.batch_tokens = Histogram(
            "batch_tokens", "Tokens computed in a forward.", buckets=_TOKENS, **make
        )
        self.batch_requests = Histogram("batch_requests", "Requests in a forward.", buckets=_COUNTS, **make)
        self.batch_seconds = Histogram("batch_seconds", "Seconds of a forward.", buckets=_SECONDS, **make)
        Gauge("queue_tokens", "Tokens of requests not answered yet.", **make).set_function(waiting_tokens)
        Gauge("requests_in_flight", "Requests read and not answered yet.", **make).set_function(in_flight)
        Gauge("connections", "Open connections.", **make).set_function(connections)
        self.connections_ended = Counter(
            "connections_ended", "Connections that the server ended before an answer.", ["reason"], **make
        )

    def note_batch(self, info: BatchInfo) -> None:
        """Counts a forward."""
        self.candidates.inc(info.candidates)
        self.tokens.inc(info.tokens)
        self.sequence_tokens.inc(info.sequence_tokens)
        self.batch_tokens.observe(info.tokens)
        self.batch_requests.observe(info.jobs)
        self.batch_seconds.observe(info.seconds)


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON: time, level, event, and its fields.

    Of an exception only type and place are logged, as its message may contain what a user sent.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Formats a record."""
        at = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": at, "level": record.levelname.lower(), "event": record.getMessage()}
        line.update(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            line["error"] = type(error).__name__
            line["at"] = [
                f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
                for frame in traceback.extract_tb(error.__traceback__)[-8:]
            ]
        return json.dumps(line, ensure_ascii=False)


class FewOfAKind(logging.Filter):
    """Lets pass only so many lines of a kind in a minute, so that a client cannot fill the disk.

    Lines are of a kind if they have the same logger, event, route and status. Requests that were scored are
    not counted. The first line of a kind in a minute says how many were left out before, as ``left_out``.

    Args:
        most: Lines of a kind in a minute.
        clock: Returns the time in seconds.
    """

    def __init__(self, most: int = 60, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._most = most
        self._clock = clock
        self._minute = 0
        self._lines: Counts[Any] = Counts()
        self._left_out: Counts[Any] = Counts()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is logged."""
        fields: dict[str, Any] = getattr(record, "fields", {})
        if fields.get("status") == 200 and "tokens" in fields:
            return True
        minute = int(self._clock() // 60)
        if minute != self._minute:
            self._minute = minute
            self._lines.clear()
        kind = (record.name, record.msg, fields.get("route"), fields.get("status"))
        self._lines[kind] += 1
        if self._lines[kind] > self._most:
            self._left_out[kind] += 1
            return False
        if left_out := self._left_out.pop(kind, 0):
            record.fields = {**fields, "left_out": left_out}
        return True


def log_as_json() -> None:
    """Sends all logs to stderr as JSON: events of this server and uvicorn, and warnings of other packages."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    handler.addFilter(FewOfAKind())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    for name in ("polar_ft", "uvicorn"):
        logging.getLogger(name).setLevel(logging.INFO)


def note(event: str, **fields: Any) -> None:
    """Logs an event with its fields."""
    log.info(event, extra={"fields": fields})
