"""The embedded server under load: requests/s and latency with 1, 8 and 64 clients, overload, and memory.

    python benchmarks/serve_load.py --quick --json OUT      within 5 minutes on two CPU cores
    python benchmarks/serve_load.py --json OUT              the same, longer
    python benchmarks/serve_load.py --soak 600 --json OUT   memory of the server over ten minutes

A request asks for the reward of one candidate, as a PPO loop does for each sample. Several candidates belong
to one (prompt, reference) and are asked for by different clients at about the same time. The server is a
process of its own, reached over HTTP on this machine; every answer is compared with the score computed here.
benchmarks/README.md says what each figure means.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.machine import describe_machine
from benchmarks.random_model import write_random_reward_model
from benchmarks.train_throughput import SHAPES
from polar_ft.groups import TokenGroup
from polar_ft.model.tiny_base import make_tiny_base
from polar_ft.scoring.scorer import RewardScorer
from polar_ft.template import PolarTemplate

LENGTHS = Path(__file__).resolve().parents[2] / "shared" / "data" / "rmb_token_lengths.jsonl"
CANDIDATES = 16  # of one (prompt, reference)
CLIENTS = (1, 8, 64)
MAX_REQUESTS = 128  # that the server takes at a time
TOLERANCE = 1e-4


@dataclass
class Request:
    """One candidate: what is sent, and the reward that must come back."""

    ids: list[int]
    expected: float = 0.0


@dataclass
class Load:
    """What clients saw.

    Attributes:
        seconds: Latency of each answer with status 200.
        tokens: Tokens of the sequences that those answers are for, shared prefixes counted each time.
        answered: Answers by status; 0 where there was none.
        wrong: Answers with another reward than expected.
        elapsed: Wall-clock time in seconds.
    """

    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    answered: Counter[int] = field(default_factory=Counter)
    wrong: int = 0
    elapsed: float = 0.0

    def add(self, other: Load) -> None:
        """Takes another load in, as if it had come after this one."""
        self.seconds += other.seconds
        self.tokens += other.tokens
        self.answered += other.answered
        self.wrong += other.wrong
        self.elapsed += other.elapsed

    def figures(self) -> dict[str, Any]:
        """For the report."""
        ordered = sorted(self.seconds)
        return {
            "requests": self.answered.total(),
            "requests_per_s": len(ordered) / self.elapsed,
            "sequence_tokens_per_s": self.tokens / self.elapsed,
            "p50_s": statistics.median(ordered) if ordered else None,
            "p99_s": ordered[int(0.99 * (len(ordered) - 1))] if ordered else None,
            "rejected_429": self.answered[429],
            "errors": self.errors,
            "wrong": self.wrong,
        }

    @property
    def errors(self) -> int:
        """Requests that were neither answered with a reward nor told to come again."""
        return self.answered.total() - self.answered[200] - self.answered[429]


def answers_workload(groups: int, seed: int) -> list[tuple[int, int, list[int]]]:
    """Lengths of questions about a passage with short answers: (prompt, reference, candidates) in tokens."""
    rng = np.random.default_rng(seed)
    return [
        (
            int(rng.integers(200, 401)),
            int(rng.integers(40, 121)),
            [int(n) for n in rng.integers(20, 81, CANDIDATES)],
        )
        for _ in range(groups)
    ]


def rmb_workload(groups: int, seed: int) -> list[tuple[int, int, list[int]]]:
    """Lengths of random prompts of RMB; the candidates' are drawn from those of the prompt's responses."""
    rng = np.random.default_rng(seed)
    rows = [json.loads(line) for line in LENGTHS.read_text().splitlines()]
    return [
        (
            max(1, row["prompt"]),
            max(1, row["reference"]),
            [max(1, int(n)) for n in rng.choice(row["responses"], CANDIDATES)],
        )
        for row in (rows[i] for i in rng.permutation(len(rows))[:groups])
    ]


def make_requests(
    lengths: list[tuple[int, int, list[int]]], scorer: RewardScorer, seed: int
) -> tuple[list[Request], float]:
    """Requests with random ids, scored here; and how many times the tokens of their trees they have."""
    rng = np.random.default_rng(seed)
    template = scorer.template
    low, high = 1000, scorer.vocab_size  # beyond the tokenizer's: no control tokens

    def text(tokens: int) -> list[int]:
        return rng.integers(low, high, tokens).tolist()

    encoded = []
    for prompt_tokens, reference_tokens, candidates in lengths:
        prompt = [*text(prompt_tokens), low]
        head = [*template.bos_ids, *prompt, *text(reference_tokens), template.separator_id, *prompt]
        sequences = [[*head, *text(tokens), template.reward_token_id] for tokens in candidates]
        encoded.append(TokenGroup.of_sequences(sequences))
    rewards = scorer.score_encoded(encoded)
    requests = [
        Request(ids.tolist(), reward)
        for item, values in zip(encoded, rewards, strict=True)
        for ids, reward in zip(item.sequences, values, strict=True)
    ]
    tree = sum(group.tree_tokens() for group in encoded)
    return requests, sum(len(request.ids) for request in requests) / tree


def one_at_a_time(scorer: RewardScorer, requests: list[Request], seconds: float) -> Load:
    """The same requests scored in this process, each by itself: no HTTP, no batch."""
    load = Load()
    started = time.perf_counter()
    for request in itertools.cycle(requests):
        begin = time.perf_counter()
        item = TokenGroup.of_sequences([request.ids])
        ((reward,),) = scorer.score_encoded([item])
        load.wrong += abs(reward - request.expected) > TOLERANCE
        load.seconds.append(time.perf_counter() - begin)
        load.tokens += len(request.ids)
        load.answered[200] += 1
        load.elapsed = time.perf_counter() - started
        if load.elapsed > seconds:
            return load
    raise AssertionError("no requests")


async def ask(client: httpx.AsyncClient, request: Request, load: Load) -> None:
    """One request, noted."""
    begin = time.perf_counter()
    try:
        response = await client.post("/classify", json={"input_ids": [request.ids]})
    except httpx.HTTPError:
        load.answered[0] += 1
        return
    load.answered[response.status_code] += 1
    if response.status_code == 200:
        load.seconds.append(time.perf_counter() - begin)
        load.tokens += len(request.ids)
        (reward,) = response.json()[0]["embedding"]
        load.wrong += abs(reward - request.expected) > TOLERANCE


def http_client(address: str) -> httpx.AsyncClient:
    """With as many connections as are needed, and no proxy."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=address, limits=limits, timeout=120, trust_env=False)


async def closed_loop(address: str, requests: list[Request], clients: int, seconds: float) -> Load:
    """Clients that send their next request when the last one is answered."""
    load = Load()
    following = itertools.cycle(requests)
    started = time.perf_counter()

    async def run(client: httpx.AsyncClient) -> None:
        while time.perf_counter() - started < seconds:
            await ask(client, next(following), load)

    async with http_client(address) as client:
        await asyncio.gather(*(run(client) for _ in range(clients)))
    load.elapsed = time.perf_counter() - started
    return load


async def open_loop(address: str, requests: list[Request], per_second: float, seconds: float) -> Load:
    """Requests that come at a rate, whether or not the last ones are answered."""
    load = Load()
    following = itertools.cycle(requests)
    started = time.perf_counter()
    tasks = []
    async with http_client(address) as client:
        for number in itertools.count():
            due = started + number / per_second
            if due > started + seconds:
                break
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(client, next(following), load)))
        await asyncio.gather(*tasks)
    load.elapsed = time.perf_counter() - started
    return load


@contextmanager
def running_server(folder: Path) -> Iterator[tuple[str, psutil.Process, Path]]:
    """`polar-ft serve` in a process of its own: its address, the process, and the file of its log."""
    command = [sys.executable, "-m", "polar_ft.cli", "serve", str(folder), "--port", "0"]
    command += ["--max-requests", str(MAX_REQUESTS)]
    with tempfile.NamedTemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if " at http" not in line:
                log.seek(0)
                raise SystemExit(f"the server did not start: {log.read()[-2000:]}")
            yield line.split(" at ")[1].split()[0], psutil.Process(process.pid), Path(log.name)
        finally:
            process.terminate()
            process.wait(30)


def token_counts(address: str) -> list[float]:
    """Tokens of all sequences that the server has scored, and those that it computed."""
    lines = httpx.get(f"{address}/metrics", trust_env=False).text.splitlines()
    counts = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return [float(counts[f"polar_ft_{name}_tokens_total"]) for name in ("sequence", "computed")]


def show(name: str, load: Load) -> dict[str, Any]:
    """Prints a row and returns its figures."""
    figures = load.figures()
    p50, p99 = (figures[key] or float("nan") for key in ("p50_s", "p99_s"))
    print(
        f"{name:34} {figures['requests_per_s']:8.2f} requests/s   p50 {p50:7.3f} s   p99 {p99:7.3f} s   "
        f"429: {figures['rejected_429']}   errors: {figures['errors']}   wrong: {figures['wrong']}",
        flush=True,
    )
    return figures


def measure(args: argparse.Namespace, folder: Path, scorer: RewardScorer) -> dict[str, Any]:
    """Both workloads, then overload."""
    seconds = 6.0 if args.quick else 20.0
    report: dict[str, Any] = {"workloads": {}}
    loads: list[Load] = []
    with running_server(folder) as (address, process, _):
        for name, lengths, rounds in (
            ("answers", answers_workload(32, 0), 4),
            ("rmb", rmb_workload(8, 0), 1),
        ):
            requests, flat_over_tree = make_requests(lengths, scorer, seed=1)
            print(f"{name}: {len(requests)} requests, {flat_over_tree:.2f} times the tokens of their trees")
            figures: dict[str, Any] = {"flat_over_tree_tokens": flat_over_tree}
            if name == "answers":
                for clients in CLIENTS[:-1]:
                    loads.append(asyncio.run(closed_loop(address, requests, clients, 2 * seconds)))
                    figures[f"clients_{clients}"] = show(f"server, {clients} clients", loads[-1])
            # In turn: the machine's own speed changes by more than a tenth from one minute to the next.
            single, crowd = Load(), Load()
            ratios = []
            before = token_counts(address)
            for _ in range(rounds):
                one = one_at_a_time(scorer, requests, seconds)
                many = asyncio.run(closed_loop(address, requests, CLIENTS[-1], 2 * seconds))
                ratios.append(many.figures()["requests_per_s"] / one.figures()["requests_per_s"])
                single.add(one)
                crowd.add(many)
            whole, computed = (b - a for a, b in zip(before, token_counts(address), strict=True))
            loads += [single, crowd]
            figures["one_at_a_time"] = show("one at a time, in this process", single)
            figures[f"clients_{CLIENTS[-1]}"] = show(f"server, {CLIENTS[-1]} clients", crowd) | {
                "sequence_over_computed_tokens": whole / computed,
                "computed_tokens_per_s": computed / crowd.elapsed,
            }
            figures["batched_over_single"] = statistics.median(ratios)
            figures["batched_over_single_rounds"] = ratios
            # The two sides get through different parts of a workload whose requests differ in length.
            figures["batched_over_single_tokens"] = (crowd.tokens / crowd.elapsed) / (
                single.tokens / single.elapsed
            )
            by_tokens = figures["batched_over_single_tokens"]
            print(
                f"{name}: {figures['batched_over_single']:.2f} times one at a time, median of {rounds}, "
                f"{min(ratios):.2f} to {max(ratios):.2f}; by tokens {by_tokens:.2f}; "
                f"{whole / computed:.2f} times the tokens computed"
            )
            report["workloads"][name] = figures
            if name == "answers":
                rate = 2 * figures[f"clients_{CLIENTS[-1]}"]["requests_per_s"]
                overload = asyncio.run(open_loop(address, requests, rate, 4 * seconds))
                loads.append(overload)
                report["overload"] = show(f"server, {rate:.1f} requests/s asked", overload)
                report["overload"]["asked_per_s"] = rate
        report["server_rss_mib"] = process.memory_info().rss / 2**20
    report["batched_over_single"] = report["workloads"]["answers"]["batched_over_single"]
    report["errors"] = sum(load.errors for load in loads)
    report["wrong"] = sum(load.wrong for load in loads)
    report["rejected_429"] = report["overload"]["rejected_429"]
    return report


def soak(args: argparse.Namespace, folder: Path, scorer: RewardScorer) -> dict[str, Any]:
    """Memory of the server under steady load of 16 clients."""
    requests, _ = make_requests(answers_workload(32, 0), scorer, seed=1)
    memory: list[tuple[float, float]] = []

    async def watch(process: psutil.Process, started: float) -> None:
        while True:
            memory.append((time.perf_counter() - started, process.memory_info().rss / 2**20))
            await asyncio.sleep(2)

    async def run(address: str, process: psutil.Process) -> Load:
        watcher = asyncio.create_task(watch(process, time.perf_counter()))
        load = await closed_loop(address, requests, 16, args.soak)
        watcher.cancel()
        return load

    with running_server(folder) as (address, process, _):
        load = asyncio.run(run(address, process))
    # The first part is left out: the allocator is still growing to its working size.
    settled = np.array([point for point in memory if point[0] >= 0.2 * args.soak])
    half = len(settled) // 2
    first, second = settled[:half, 1], settled[half:, 1]
    figures = show("server, 16 clients", load) | {
        "seconds": args.soak,
        "rss_mib_first_half_median": float(np.median(first)),
        "rss_mib_second_half_median": float(np.median(second)),
        "rss_mib_max": float(settled[:, 1].max()),
        "rss_mib_by_minute": [
            float(np.median([rss for at, rss in memory if at // 60 == minute]))
            for minute in range(int(memory[-1][0] // 60) + 1)
        ],
    }
    print(
        f"memory: median {figures['rss_mib_first_half_median']:.0f} MiB in the first half, "
        f"{figures['rss_mib_second_half_median']:.0f} MiB in the second, at most {figures['rss_mib_max']:.0f}"
    )
    return {"soak": figures}


def model_folder(work_dir: Path, shape: str) -> Path:
    """A model with random weights, made if it is not there."""
    folder = work_dir / shape
    if not (folder / "model.safetensors").is_file():
        make_tiny_base(folder, ["a text for a tokenizer"], vocab_size=300)
        template = PolarTemplate.from_pretrained(folder)
        write_random_reward_model(folder, SHAPES[shape], template.reward_token_id)
    return folder


def main() -> None:
    """Measures and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="within 5 minutes on two cores")
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="memory under steady load instead")
    parser.add_argument("--shape", default="25m", choices=["25m", "1.8b"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/benchmarks/serve"))
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends with the benchmark
    folder = model_folder(args.work_dir, args.shape)
    scorer = RewardScorer.from_pretrained(folder)
    report = {"machine": describe_machine(), "shape": args.shape, "candidates_per_reference": CANDIDATES}
    report |= soak(args, folder, scorer) if args.soak else measure(args, folder, scorer)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
