"""Rewards by rule: whether the final answer of a mathematical problem is right, by math-verify.

math-verify (pip install 'polar-ft[math]') parses two expressions and lets sympy compare them, which may take
hours on an answer that a policy has made. Its own time limit is signal.alarm, which only a main thread may
use, and frameworks call rewards from threads. So answers are compared in processes of their own, and one
whose time is up is killed. They are plain subprocesses: multiprocessing's spawn would import the training
script again, and is forbidden to daemonic processes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

from polar_ft.errors import PolarError

Rule = Literal["math"]
# "failed": neither in the time nor in the memory that it has; "no gold": the reference cannot be parsed.
Verdict = Literal["right", "wrong", "failed", "no gold"]

# Bytes of address space of a process: sympy computes 9^(9^9) exactly if it can.
_MEMORY = 4 * 2**30
# A word of prose, not the name of a LaTeX command.
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_PROGRAM = "from polar_ft.rft.rules import compare_lines; compare_lines()"
# Seconds in which a process has to import sympy; 0.4 s on an idle machine.
_START = 120.0


def final_answer(text: str) -> str:
    r"""The last ``\boxed{…}`` of a solution, as it stands there; the text itself if there is none.

    >>> final_answer(r"So $x = \boxed{\frac{1}{2}}$, or half.")
    '\\boxed{\\frac{1}{2}}'
    >>> final_answer("x = 1/2"), final_answer(r"\boxed{never closed")
    ('x = 1/2', '\\boxed{never closed')
    """
    start = text.rfind(r"\boxed{")
    depth = 0
    for place in range(max(start, 0), len(text) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if text[place] == "}" and depth == 0:
            return text[start : place + 1]
    return text


class MathRule:
    """Compares final answers, in processes that are started when first needed.

    Args:
        seconds: What one comparison may take.
        processes: How many are compared at a time.

    Raises:
        PolarError: math-verify is not installed.
    """

    def __init__(self, seconds: float = 10.0, processes: int = min(4, os.cpu_count() or 1)) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise PolarError("rule \"math\": math-verify is not installed; run pip install 'polar-ft[math]'")
        self._seconds = seconds
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="polar-math")
        self._own = threading.local()
        self._workers: list[_Worker] = []

    def check(self, references: Sequence[str], answer: str) -> Future[Verdict]:
        """Compares an answer with references; it is right if it equals the final answer of one of them."""
        return self._threads.submit(self._check, list(references), answer)

    def close(self) -> None:
        """Ends the processes."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.end()

    def _check(self, references: list[str], answer: str) -> Verdict:
        worker: _Worker | None = getattr(self._own, "worker", None)
        if worker is not None and worker.ended:
            # Killed by others, such as the kernel for want of memory: no fault of this answer.
            self._forget(worker)
            worker = None
        if worker is None:
            worker = self._own.worker = _Worker()
            self._workers.append(worker)
        found = worker.ask({"golds": list(map(final_answer, references)), "answer": answer}, self._seconds)
        if found is None:
            self._forget(worker)
            return "failed"
        return found

    def _forget(self, worker: _Worker) -> None:
        self._own.worker = None
        self._workers.remove(worker)
        worker.end()


class _Worker:
    """A process that compares."""

    def __init__(self) -> None:
        # The same path as here, wherever this package was imported from.
        path = os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            encoding="utf-8",
        )
        if self._line(_START) != "ready":
            self.end()  # it may have written something else
            raise PolarError(
                "rule \"math\": its process does not start; see what python -c 'import math_verify' says"
            )

    def ask(self, question: dict[str, Any], seconds: float) -> Any:
        """The verdict; None if the process has ended or was ended."""
        return self._line(seconds, json.dumps(question) + "\n") or None

    @property
    def ended(self) -> bool:
        """Whether the process has ended while nothing was asked."""
        return self._process.poll() is not None

    def _line(self, seconds: float, question: str = "") -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(seconds, self._process.kill)
        timer.start()  # first: where that fails, no verdict is left to be read as the next one's
        try:
            self._process.stdin.write(question)
            self._process.stdin.flush()
            line = self._process.stdout.readline().rstrip("\n")
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            self.end()
        return line

    def end(self) -> None:
        """Ends the process and closes its pipes; does nothing the second time."""
        assert self._process.stdout is not None
        if self._process.stdout.closed:
            return
        self._process.kill()
        self._process.communicate()


def compare_lines() -> None:
    """The process: reads ``{"golds": […], "answer": …}`` line by line and writes a verdict for each."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    from math_verify import parse, verify

    # What packages print must not get among the verdicts.
    out, sys.stdout = sys.stdout, sys.stderr

    def expressions(text: str) -> list[Any]:
        found = parse(text, parsing_timeout=None)
        if found or _WORD.search(text):
            return found
        # Plain LaTeX such as \frac12 is read between dollar signs only.
        return parse(f"${text}$", parsing_timeout=None)

    def verdict(golds: Sequence[str], answer: str) -> Verdict:
        parsed = [found for found in map(expressions, golds) if found]
        if not parsed:
            return "no gold"
        said = parse(answer, parsing_timeout=None)
        return "right" if any(verify(gold, said, timeout_seconds=None) for gold in parsed) else "wrong"

    print("ready", file=out, flush=True)
    for line in sys.stdin:
        print(verdict(**json.loads(line)), file=out, flush=True)
