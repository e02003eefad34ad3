"""Events: what the first rank of a run reports to the command that started it, for the terminal.

They are lines of JSON, appended to a file in the folder that ties the processes of a run together
(`polar_ft.training.ranks`). Without such a folder, as under ``xtuner train``, nothing is written: the log has
all of it anyway.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from polar_ft.training.ranks import FOLDER_VARIABLE

_FILE = "events.jsonl"
_PACKAGE = str(Path(__file__).parents[2])

# ``extra`` of a log record that an event of its own describes.
REPORTED = {"polar_ft_reported": True}

Event = dict[str, Any]


def report(kind: str, **fields: Any) -> None:
    """Reports an event.

    Args:
        kind: "phase" (``text``: what is being done), "line" (``text``, ``level``), "step" (``step``,
            ``steps``, ``left`` in seconds, ``figures`` by name) or "validation" (``step``, ``figures``,
            ``best``: whether it is the best so far, ``text``).
        **fields: What belongs to it.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is None or os.environ.get("RANK", "0") != "0":
        return
    with suppress(OSError), Path(folder, _FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": kind, **fields}) + "\n")


class EventReader:
    """Reads the events of a run while it writes them.

    Args:
        folder: That ties its processes together.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / _FILE
        self._read = 0  # bytes

    def new(self) -> Iterator[Event]:
        """Those that were not read before."""
        try:
            with self._file.open("rb") as file:
                file.seek(self._read)
                content = file.read()
        except FileNotFoundError:
            return
        complete = content[: content.rfind(b"\n") + 1]
        self._read += len(complete)
        yield from map(json.loads, complete.splitlines())


def report_log_records() -> None:
    """Has what polar_ft logs reported as events too, and nobody else's. A second call does nothing."""
    from mmengine.logging import MMLogger

    original = MMLogger.callHandlers
    if hasattr(original, "polar_ft"):
        return

    def callHandlers(self: MMLogger, record: logging.LogRecord) -> None:  # noqa: N802
        original(self, record)
        _report_record(record)

    # Not a handler of one logger: model and data are built while mmengine's runner makes its logger.
    callHandlers.polar_ft = True  # type: ignore[attr-defined]
    MMLogger.callHandlers = callHandlers
    for handler in (_Reporter(logging.WARNING), logging.StreamHandler()):
        logging.getLogger("polar_ft").addHandler(handler)


class _Reporter(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _report_record(record)


def _report_record(record: logging.LogRecord) -> None:
    if record.pathname.startswith(_PACKAGE) and not hasattr(record, "polar_ft_reported"):
        report("line", text=record.getMessage(), level=record.levelname.lower())
