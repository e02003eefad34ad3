"""Servers as processes: started, waited for, ended with everything that they started."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

START_SECONDS = 240
CONTEXT = 1024


@dataclass(frozen=True)
class Vllm:
    """A running vLLM.

    Attributes:
        address: ``host:port``.
    """

    address: str

    def pooling(self, ids: Sequence[Sequence[int]], **fields: object) -> list[float]:
        """``POST /pooling``, by hand: the last token's score of each input."""
        answer = httpx.post(
            f"http://{self.address}/pooling", json={"input": ids, **fields}, timeout=120
        ).raise_for_status()
        return [item["data"][-1][0] for item in answer.json()["data"]]


@contextmanager
def vllm_server(
    environment: Path, model: Path, folder: Path, *options: str, remote_code: bool = True
) -> Iterator[Vllm]:
    """`vllm serve` on a free port of this machine.

    Args:
        environment: Where vLLM is installed.
        model: What to serve.
        folder: For its log and caches.
        options: More options.
        remote_code: Whether the model needs its own code, and to be told that it is pooled.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(environment / "bin" / "vllm"), "serve", str(model)]
    command += ["--runner", "pooling", "--trust-remote-code"] if remote_code else []
    command += [
        "--dtype",
        "float32",
        "--max-model-len",
        str(CONTEXT),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    # Compiling takes longer than everything that is asked here.
    command += ["--enforce-eager", *options]
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }

    def healthy(log: str) -> str | None:
        try:
            alive = httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return None
        return f"127.0.0.1:{port}" if alive else None

    with _running(command, folder / "vllm.log", settings, healthy) as address:
        yield Vllm(address)


@contextmanager
def polar_server(model: Path, folder: Path, *options: str) -> Iterator[str]:
    """`polar-ft serve` on a free port of this machine; its ``host:port``."""
    command = [sys.executable, "-m", "polar_ft.cli", "serve", str(model), "--port", "0", *options]

    def printed(log: str) -> str | None:
        found = re.search(r"serving .* at http://(\S+)", log)
        return found[1].rstrip("/") if found else None

    with _running(command, folder / "polar.log", {"PYTHONUNBUFFERED": "1"}, printed) as address:
        yield address


@contextmanager
def _running(
    command: Sequence[str], log: Path, settings: dict[str, str], ready: Callable[[str], str | None]
) -> Iterator[str]:
    environment = {**os.environ, **settings}
    # The path of this environment's packages is none of the other's business.
    environment.pop("PYTHONPATH", None)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        until = time.monotonic() + START_SECONDS
        while (address := ready(_read(log))) is None:
            assert process.poll() is None, f"{command[0]} ended:\n{_read(log)[-6000:]}"
            assert time.monotonic() < until, f"not ready in {START_SECONDS} s:\n{_read(log)[-6000:]}"
            time.sleep(0.2)
        yield address
    finally:
        _end(process)


def _read(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process politely, then whatever is left of its session."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
