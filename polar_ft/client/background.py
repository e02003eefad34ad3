"""One event loop for all clients of a process, in a thread of its own.

So the calls of a client work in a script, in a notebook (which has a running loop already) and from many
threads at once, and connections stay open between calls.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")

# Re-entrant: the garbage collector may close a client while the lock is held.
_lock = threading.RLock()
_loop: asyncio.AbstractEventLoop | None = None


def _forget_loop() -> None:
    # A thread does not live on in a forked process: what waits for it there would wait for ever.
    global _loop, _lock
    _loop, _lock = None, threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_loop)


def event_loop() -> asyncio.AbstractEventLoop:
    """The loop, running; started at the first call, and again in a forked process."""
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="polar_ft.client", daemon=True).start()
        return _loop


def start(work: Coroutine[Any, Any, Result]) -> Future[Result]:
    """Starts the work in the loop; the future may be waited for anywhere."""
    return asyncio.run_coroutine_threadsafe(work, event_loop())


def wait_for(future: Future[Result]) -> Result:
    """The result of what was started; interrupted (Ctrl-C), it stops the work."""
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise
