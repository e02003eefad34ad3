"""The embedded server while one client attacks it: memory, and what others notice.

    python benchmarks/serve_hostile.py --json OUT       about three minutes, on this machine only

Four clients ask for rewards one after the other, and a fifth asks for /health every 50 ms: first alone, then
during each attack, whose clients are processes of their own. Every wait has an end. benchmarks/README.md says
what each figure means.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.machine import describe_machine
from benchmarks.serve_load import (
    Load,
    Request,
    ask,
    http_client,
    make_requests,
    model_folder,
    running_server,
)
from polar_ft.scoring.scorer import RewardScorer

CLIENTS = 10  # of an attack
HONEST = 4

# Every attack ends after so many seconds, and each of its requests gets so many.
ATTACK_SECONDS = 60.0
REQUEST_SECONDS = 30.0

MB = 10**6


def large_prompt() -> bytes:
    """A prompt of 60 MB."""
    return b'{"prompt": "' + b"word " * (12 * MB) + b'", "reference": "", "candidates": ["a"]}'


def long_prompt() -> bytes:
    """A prompt of 7 MB, which the body limit allows."""
    return b'{"prompt": "' + b"word " * (7 * MB // 5) + b'", "reference": "", "candidates": ["a"]}'


def empty_objects() -> bytes:
    """Inputs without any field, 7 MB."""
    return b'{"inputs": [' + b"{}," * (7 * MB // 3) + b"{}]}"


def faulty_inputs() -> bytes:
    """As many inputs as one request may have, each with faults."""
    return b'{"inputs": [' + b'{"candidates": [1, 2, 3]},' * 5000 + b"{}]}"


def empty_lists() -> bytes:
    """Sequences without ids, 7 MB."""
    return b'{"input_ids": [' + b"[]," * (7 * MB // 3) + b"[]]}"


# Each with the route and the number of requests.
BODIES: dict[str, tuple[Callable[[], bytes], str, int]] = {
    "prompt_60_mb": (large_prompt, "/v1/rewards", 100),
    "prompt_7_mb": (long_prompt, "/v1/rewards", 100),
    "empty_objects_7_mb": (empty_objects, "/v1/rewards", 100),
    "faulty_inputs": (faulty_inputs, "/v1/rewards", 100),
    "empty_lists_7_mb": (empty_lists, "/classify", 100),
}


def send_bodies(address: str, name: str, counted: Any) -> None:
    """Sends the requests of an attack from several clients; puts the number of each status into a queue."""
    make, route, number = BODIES[name]
    body = make()
    head = f"POST {route} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode()
    ends = time.monotonic() + ATTACK_SECONDS

    def send(_: int) -> int:
        if time.monotonic() > ends:
            return -1
        host, port = address.split(":")
        try:
            with socket.create_connection((host, int(port)), REQUEST_SECONDS) as connection:
                connection.sendall(request)
                connection.sendall(body)
                return int(connection.recv(4096).split()[1])
        except (OSError, IndexError, ValueError):
            return 0

    with ThreadPoolExecutor(CLIENTS) as pool:
        counted.put(Counter(pool.map(send, range(number))))


def hold_connections(address: str, name: str, counted: Any) -> None:
    """Opens connections and sends a part of a request on each, again and again for 20 s."""
    sent = b"POST /v1/rewards HTTP/1.1\r\nHost: " + address.encode() + b"\r\n"
    if name == "slow_bodies":
        sent += b'Content-Type: application/json\r\nContent-Length: 1000000\r\n\r\n{"prompt": "'
    host, port = address.split(":")
    opened: list[socket.socket] = []
    ends = time.monotonic() + 20
    while time.monotonic() < ends:
        try:
            connection = socket.create_connection((host, int(port)), 5)
            connection.sendall(sent)
            opened.append(connection)
        except OSError:
            time.sleep(0.05)
        for one in opened[-50:]:
            try:
                one.send(b"a")
            except OSError:
                opened.remove(one)
                one.close()
        if len(opened) >= 300:
            opened.pop(0).close()
        time.sleep(0.01)
    counted.put(Counter({0: len(opened)}))


async def honest_load(
    address: str, requests: list[Request], process: psutil.Process, stop: Callable[[float], bool]
) -> dict[str, Any]:
    """What clients that do nothing wrong see until ``stop`` says so; and the server's memory meanwhile."""
    load, health = Load(), Load()
    following = itertools.cycle(requests)
    started = time.perf_counter()
    memory = [process.memory_info().rss]

    def running() -> bool:
        return not stop(time.perf_counter() - started)

    async def rewards(client: httpx.AsyncClient) -> None:
        while running():
            await ask(client, next(following), load)

    async def healths(client: httpx.AsyncClient) -> None:
        while running():
            begin = time.perf_counter()
            try:
                health.answered[(await client.get("/health")).status_code] += 1
                health.seconds.append(time.perf_counter() - begin)
            except httpx.HTTPError:
                health.answered[0] += 1
            memory.append(process.memory_info().rss)
            await asyncio.sleep(0.05)

    async with http_client(f"http://{address}") as client:
        await asyncio.gather(*(rewards(client) for _ in range(HONEST)), healths(client))
    load.elapsed = health.elapsed = time.perf_counter() - started
    figures = load.figures()
    return {
        "seconds": load.elapsed,
        "requests": figures["requests"],
        "p50_s": figures["p50_s"],
        "p99_s": figures["p99_s"],
        "not_answered": load.answered.total() - load.answered[200],
        "wrong": load.wrong,
        "health_p99_s": health.figures()["p99_s"],
        "health_not_answered": health.errors,
        "rss_mib_max": max(memory) / 2**20,
    }


def measure(folder: Path, scorer: RewardScorer) -> dict[str, Any]:
    """Alone, then during each attack."""
    requests, _ = make_requests([(30, 10, [15] * 16)] * 16, scorer, seed=1)  # short, so that they are many
    report: dict[str, Any] = {"attacks": {}}
    context = multiprocessing.get_context("spawn")
    with running_server(folder) as (url, process, log):
        address = url.removeprefix("http://")

        def alone(seconds: float) -> dict[str, Any]:
            return asyncio.run(honest_load(address, requests, process, lambda passed: passed > seconds))

        alone(5)  # the allocator grows to its working size
        report["idle_rss_mib"] = process.memory_info().rss / 2**20
        report["alone"] = alone(20)
        print(f"alone: {report['alone']}", flush=True)
        for name in (*BODIES, "unfinished_headers", "slow_bodies"):
            counted = context.Queue()
            attack = hold_connections if name not in BODIES else send_bodies
            attacker = context.Process(target=attack, args=(address, name, counted), daemon=True)
            attacker.start()
            figures = asyncio.run(
                honest_load(
                    address,
                    requests,
                    process,
                    lambda passed, attacker=attacker: (passed > 5 and not attacker.is_alive()) or passed > 90,
                )
            )
            answered = counted.get(timeout=10)
            attacker.join(10)
            figures["attack_answers"] = {str(status): n for status, n in sorted(answered.items())}
            figures["p99_over_alone"] = figures["p99_s"] / report["alone"]["p99_s"]
            figures["rss_over_idle"] = figures["rss_mib_max"] / report["idle_rss_mib"]
            report["attacks"][name] = figures
            print(f"{name}: {figures}", flush=True)
        report["log_bytes"] = log.stat().st_size
    attacks = report["attacks"].values()
    report["rss_over_idle"] = max(figures["rss_over_idle"] for figures in attacks)
    report["p99_over_alone"] = max(figures["p99_over_alone"] for figures in attacks)
    report["not_answered"] = sum(
        figures["not_answered"] + figures["health_not_answered"] for figures in attacks
    )
    return report


def main() -> None:
    """Measures and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/benchmarks/serve"))
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends with the benchmark
    folder = model_folder(args.work_dir, "25m")
    report = {"machine": describe_machine(), "honest_clients": HONEST, "attacking_clients": CLIENTS}
    report |= measure(folder, RewardScorer.from_pretrained(folder))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
