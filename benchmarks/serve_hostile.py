"""The embedded server while one client attacks it: memory, and what others notice.

    python benchmarks/serve_hostile.py --json OUT       about six minutes, on this machine only

Four clients ask for rewards one after the other, and a fifth asks for /health every 50 ms: before each
attack, and during it. The attacking clients are a process of their own. Every wait has an end.
benchmarks/README.md says what each figure means.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.hostile_clients import BODIES, CLIENTS
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

HONEST = 4


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
    with running_server(folder) as (url, process, log):
        address = url.removeprefix("http://")

        def alone(seconds: float) -> dict[str, Any]:
            return asyncio.run(honest_load(address, requests, process, lambda passed: passed > seconds))

        alone(5)  # the allocator grows to its working size
        report["idle_rss_mib"] = process.memory_info().rss / 2**20
        for name in (*BODIES, "unfinished_headers", "slow_bodies"):
            before = alone(8)  # the machine's own speed changes from one minute to the next
            command = [sys.executable, str(Path(__file__).with_name("hostile_clients.py")), address, name]
            attacker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

            def over(passed: float, attacker: subprocess.Popen[str] = attacker) -> bool:
                return (passed > 5 and attacker.poll() is not None) or passed > 130

            figures = asyncio.run(honest_load(address, requests, process, over))
            figures["attack_answers"] = json.loads(attacker.communicate(timeout=10)[0])
            figures["alone_p50_s"], figures["alone_p99_s"] = before["p50_s"], before["p99_s"]
            figures["p99_over_alone"] = figures["p99_s"] / before["p99_s"]
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
