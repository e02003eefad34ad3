"""4,096 samples through the per-sample adapter, against a direct batch call, and with a server restart.

    python benchmarks/rft_throughput.py --json OUT

A framework that asks for one reward at a time has a loop of its own, which costs time whatever the reward is.
So three things are measured in turn, in one process that is not the server's: the framework's loop with a
constant in place of the reward, a direct call of `RewardModelClient` with all rows, and the loop with the
adapter (`polar_ft.rft.verl.compute_score`). The adapter is as fast as it can be if it takes as long as the
first two together. The server counts the candidates that it scored: each sample once. Last, the server is
killed in the middle of a run and started again.

The loop is that of verl 0.9's own reward manager where .venv-rft/verl-0.9 is there (`tools/rft_env.sh
verl-0.9`), else a plain asyncio loop; the report says which.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from polar_ft.client import RewardModelClient  # noqa: E402
from polar_ft.rft.verl import compute_score  # noqa: E402

SAMPLES = 4096
OUTPUTS = 8  # of each prompt
REPEATS = 5
NEEDED = 0.9
TOLERANCE = 1e-4
VERL = ROOT / ".venv-rft" / "verl-0.9" / "bin" / "python"
MODEL = dict(
    vocab_size=768,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)

Row = dict[str, Any]
Function = Callable[..., Awaitable[dict[str, float]]]
# All rows with a reward function, one call a sample: the score of each.
Loop = Callable[[Function], Awaitable[list[float]]]


def make_rows(samples: int = SAMPLES) -> list[Row]:
    """Rows as the direct call takes them; the outputs of a prompt are adjacent, as rollouts are."""
    return [
        {
            "prompt": f"A shop sells {n} apples for {n % 7 + 2} coins each. What do they cost together?",
            "reference": f"They cost {n * (n % 7 + 2)} coins together.",
            "output": f"{n} times {n % 7 + 2} is {n * (n % 7 + 2) + k}, so that is the price; {k} is left.",
        }
        for n, k in (divmod(i, OUTPUTS) for i in range(samples))
    ]


# ---- in the environment of the framework


async def constant(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Row, **_: Any
) -> dict[str, float]:
    """What `compute_score` returns, without a reward."""
    return {"score": 0.5, "answered": 1.0, "truncated": 0.0, "length": float(len(solution_str))}


def plain_loop(rows: list[Row]) -> tuple[str, Loop]:
    """All samples in flight at once, without a framework."""

    async def loop(function: Function) -> list[float]:
        calls = [
            function(
                data_source="polar",
                solution_str=row["output"],
                ground_truth=row["reference"],
                extra_info={"prompt": row["prompt"]},
            )
            for row in rows
        ]
        return [result["score"] for result in await asyncio.gather(*calls)]

    return "asyncio.gather", loop


def verl_loop(rows: list[Row]) -> tuple[str, Loop]:
    """verl's own reward manager, asked as its worker asks it: for one row at a time, all rows at once."""
    import numpy as np
    import torch
    import verl
    from omegaconf import OmegaConf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from verl import DataProto
    from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    encoded = [[*tokenizer.encode(row["output"]), tokenizer.eos_token_id] for row in rows]
    width = max(map(len, encoded))
    responses = torch.full((len(rows), width), tokenizer.pad_token_id)
    for number, ids in enumerate(encoded):
        responses[number, : len(ids)] = torch.tensor(ids)
    prompts = torch.full((len(rows), 1), tokenizer.eos_token_id)
    data = DataProto.from_dict(
        tensors={
            "prompts": prompts,
            "responses": responses,
            "input_ids": torch.cat([prompts, responses], 1),
            "attention_mask": torch.cat([prompts, responses], 1) != tokenizer.pad_token_id,
        },
        non_tensors={
            "data_source": np.array(["polar"] * len(rows), dtype=object),
            "reward_model": np.array([{"ground_truth": row["reference"]} for row in rows], dtype=object),
            "extra_info": np.array([{"prompt": row["prompt"]} for row in rows], dtype=object),
        },
    )
    config = OmegaConf.create({"reward": {}, "reward_model": {}, "data": {}})

    async def loop(function: Function) -> list[float]:
        manager = get_reward_manager_cls("naive")(config=config, tokenizer=tokenizer, compute_score=function)
        samples = (data[number : number + 1] for number in range(len(rows)))
        results = await asyncio.gather(*map(manager.run_single, samples))
        return [float(result["reward_score"]) for result in results]

    return f"verl {verl.__version__}, naive reward manager", loop


def child(given: Row) -> None:
    """Measures, and writes a line of JSON for the parent when it needs something, and at the end."""
    rows = make_rows(given["samples"])
    framework, loop = verl_loop(rows) if given["verl"] else plain_loop(rows)
    address = given["server"]
    settings = {"model": given["model"], "server_address": address, "floor": -100.0}
    client = RewardModelClient(given["model"], server_address=address)
    answered = 0

    async def adapter(**sample: Any) -> dict[str, float]:
        return await compute_score(**sample, **settings)

    async def adapter_with_restart(**sample: Any) -> dict[str, float]:
        nonlocal answered
        row = await adapter(**sample)
        answered += 1
        if answered == len(rows) // 4:
            print(json.dumps({"restart": True}), flush=True)
        return row

    # The first calls import and connect.
    direct = client(rows[:64])
    asyncio.run(loop(constant))
    asyncio.run(compute_score("polar", rows[0]["output"], rows[0]["reference"], rows[0], **settings))
    seconds: dict[str, list[float]] = {"loop": [], "direct": [], "adapter": []}
    scored, wrong = [], 0
    for _ in range(given["repeats"]):
        begin = time.perf_counter()
        asyncio.run(loop(constant))
        seconds["loop"].append(time.perf_counter() - begin)

        begin = time.perf_counter()
        direct = client(rows)
        seconds["direct"].append(time.perf_counter() - begin)

        before = count(address, "candidates_total")
        begin = time.perf_counter()
        rewards = asyncio.run(loop(adapter))
        seconds["adapter"].append(time.perf_counter() - begin)
        scored.append(count(address, "candidates_total") - before)
        wrong += different(rewards, direct)
    begin = time.perf_counter()
    rewards = asyncio.run(loop(adapter_with_restart))
    restarted = {
        "seconds": time.perf_counter() - begin,
        "rewards": len(rewards),
        "wrong": different(rewards, direct),
        # Those of the other server died with it.
        "scored_after_restart": count(address, "candidates_total"),
    }
    report = {"framework": framework, "seconds": seconds, "scored": scored, "wrong": wrong}
    print(json.dumps(report | {"restart_run": restarted}), flush=True)


def different(rewards: list[float], right: list[float]) -> int:
    """Rewards that are not those of their rows."""
    return sum(abs(a - b) > TOLERANCE for a, b in zip(rewards, right, strict=True))


def count(address: str, name: str) -> float:
    """A number of the server's metrics."""
    text = httpx.get(f"http://{address}/metrics", trust_env=False, timeout=60).text
    return sum(
        float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(f"polar_ft_{name}")
    )


# ---- the parent


class RestartableServer:
    """`polar-ft serve`, and again on the same port."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.port = 0
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "polar_ft.cli", "serve", str(self.model), "--port", str(self.port)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        if " at http" not in line:
            raise SystemExit(f"the server did not start: {line}")
        self.port = int(line.split(" at ")[1].split()[0].rsplit(":", 1)[1])
        return process

    def restart(self) -> float:
        """Kills the server and starts it again; gives the seconds that it was away."""
        begin = time.perf_counter()
        self.process.kill()
        self.process.wait(30)
        self.process = self._start()
        return time.perf_counter() - begin


@contextmanager
def running_server(model: Path) -> Iterator[RestartableServer]:
    """Serves a model until the end of the block."""
    server = RestartableServer(model)
    try:
        yield server
    finally:
        server.process.terminate()
        server.process.wait(30)


def make_model(folder: Path) -> Path:
    """A tiny model with random weights, made if it is not there."""
    from benchmarks.random_model import write_random_reward_model
    from polar_ft.model.tiny_base import make_tiny_base
    from polar_ft.template import PolarTemplate

    if not (folder / "model.safetensors").is_file():
        texts = [" ".join(row.values()) for row in make_rows(512)]
        make_tiny_base(folder, texts, vocab_size=MODEL["vocab_size"])
        template = PolarTemplate.from_pretrained(folder)
        write_random_reward_model(folder, MODEL, template.reward_token_id)
    return folder


def measure(args: argparse.Namespace) -> Row:
    """Runs the measurements of `child` and restarts the server when it asks for that."""
    with running_server(make_model(args.work_dir.resolve())) as server:
        given = {
            "verl": VERL.exists(),
            "samples": args.samples,
            "repeats": args.repeats,
            "model": str(server.model),
            "server": f"127.0.0.1:{server.port}",
        }
        python = str(VERL) if given["verl"] else sys.executable
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [python, __file__, "--child", json.dumps(given)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            result: Row = {}
            away = 0.0
            for line in process.stdout:
                if line.startswith('{"restart"'):
                    away = server.restart()
                elif line.startswith("{"):
                    result = json.loads(line)
        if process.returncode or not result:
            raise SystemExit(f"the measurement failed with status {process.returncode}")
    result["restart_run"]["server_away_seconds"] = away
    medians = {name: statistics.median(values) for name, values in result["seconds"].items()}
    return {
        **result,
        "samples": args.samples,
        "model_parameters": sum_of_parameters(server.model),
        "median_seconds": medians,
        "adapter_over_direct_net_of_loop": (medians["direct"] + medians["loop"]) / medians["adapter"],
        "needed": NEEDED,
    }


def sum_of_parameters(folder: Path) -> int:
    """Parameters of a model's shard."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "np") as weights:
        return sum(weights.get_tensor(name).size for name in weights.keys())  # noqa: SIM118


def main() -> None:
    """Measures, writes the figures, and fails where a reward is missing, wrong or scored twice."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "work_dirs/benchmarks/rft_throughput")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends with the benchmark
    from benchmarks.machine import describe_machine

    report = {"machine": describe_machine(), **measure(args)}
    medians, restart = report["median_seconds"], report["restart_run"]
    ratio = report["adapter_over_direct_net_of_loop"]
    print(
        f"{report['framework']}, {args.samples} samples, medians of {args.repeats}: its loop with a constant "
        f"{medians['loop']:.2f} s, a direct call {medians['direct']:.2f} s, with the adapter "
        f"{medians['adapter']:.2f} s: {ratio:.0%} of the direct call's throughput net of the loop\n"
        f"with a restart (away for {restart['server_away_seconds']:.1f} s): {restart['seconds']:.1f} s, "
        f"{restart['rewards']} rewards, {restart['wrong']} wrong"
    )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    problems = [
        what
        for what, wrong in {
            "a reward is wrong": report["wrong"] or restart["wrong"],
            "a sample was not scored exactly once": set(report["scored"]) != {args.samples},
            "a reward is missing after the restart": restart["rewards"] != args.samples,
            f"less than {NEEDED:.0%} of the direct call's throughput": ratio < NEEDED,
        }.items()
        if wrong
    ]
    if problems:
        raise SystemExit("; ".join(problems))


if __name__ == "__main__":
    main()
