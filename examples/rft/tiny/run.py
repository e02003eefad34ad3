"""A whole reinforcement fine-tuning on a CPU: a careless policy learns to read its catalogue.

    make demo                                  # trains the reward model, once
    tools/rft_env.sh trl                       # installs TRL in an environment of its own, once
    python examples/rft/tiny/run.py            # about 7 minutes on two cores

For each seed: a policy is supervised on a careless clerk's answers, then trained by TRL's GRPO with the
demo's reward model behind `polar-ft serve`; once with the right references and once with shuffled ones, from
which nothing can be learned. One more run, without a KL term, is what reward hacking looks like.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from polar_ft.errors import PolarError
from polar_ft.rft.watch import alarms, read_watch

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = "examples/rft/tiny/policy.py"
# What the runs have to reach; the first is far above the 16.7 % of guessing, the second is near it.
MIN_RIGHT = 0.90
MAX_RIGHT_SHUFFLED = 0.40
CONSOLE = Console(highlight=False)

# The arguments of each kind of run.
ARMS: dict[str, list[str]] = {
    "references": [],
    "shuffled": ["--shuffled"],
    "hacked": ["--beta", "0", "--lr", "2e-4"],
}


def main(
    out: Annotated[Path, typer.Option(help="Folder for everything.")] = Path("work_dirs/rft_tiny"),
    demo: Annotated[Path, typer.Option(help="The demo's domain_rm folder.")] = Path(
        "work_dirs/demo/domain_rm"
    ),
    environment: Annotated[Path, typer.Option(help="Environment with TRL.")] = Path(".venv-rft/trl"),
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    steps: Annotated[int, typer.Option(min=4, help="GRPO steps of a run.")] = 100,
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 2,
) -> None:
    """Runs everything, draws rft.png and writes rft.json."""
    if not (demo / "model" / "config.json").is_file():
        raise PolarError(f"{demo}: has no reward model; run make demo first")
    if not (environment / "bin" / "python").exists():
        raise PolarError(f"{environment}: has no TRL; run tools/rft_env.sh trl first")
    started = time.perf_counter()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    model = out / "reward_model"
    shutil.copytree(demo / "model", model)
    cli = [sys.executable, "-m", "polar_ft.cli"]
    _run([*cli, "calibrate", str(model), str(demo / "data" / "held_out.jsonl")], out / "calibrate.log")
    python = str((environment / "bin" / "python").absolute())
    data = str(demo / "data")

    with ThreadPoolExecutor(workers) as pool:
        server = subprocess.Popen(
            [*cli, "serve", str(model), "--port", "0"],
            stdout=(out / "serve.log").open("w"),
            stderr=subprocess.STDOUT,
            env=_environment(),
        )
        try:
            address = _address(out / "serve.log", server)

            def supervise(seed: int) -> None:
                command = [python, SCRIPT, "supervise", data, str(out / f"policy{seed}"), "--seed", str(seed)]
                _run(command, out / f"policy{seed}.log")

            list(pool.map(supervise, range(seeds)))

            def train(run: tuple[str, int]) -> dict[str, Any]:
                arm, seed = run
                folder = out / f"{arm}{seed}"
                folder.mkdir()
                command = [python, SCRIPT, "train", data, str(out / f"policy{seed}"), str(folder)]
                command += ["--model", str(model), "--server", address, "--seed", str(seed)]
                _run([*command, "--steps", str(steps), *ARMS[arm]], out / f"{folder.name}.log")
                result = json.loads((folder / "result.json").read_text())
                return {"arm": arm, "seed": seed, **result, "alarms": alarms(read_watch(folder / "watch"))}

            runs = [(arm, seed) for seed in range(seeds) for arm in ("references", "shuffled")] + [
                ("hacked", 0)
            ]
            results = list(pool.map(train, runs))
        finally:
            server.terminate()
            server.wait(30)

    seconds = time.perf_counter() - started
    (out / "rft.json").write_text(json.dumps({"seconds": seconds, "runs": results}, indent=1) + "\n")
    _plot(results, out / "rft.png")
    _show(results, seconds)
    _check(results)


def _check(results: Sequence[dict[str, Any]]) -> None:
    """Raises PolarError where a run did not do what it is to show."""
    for result in results:
        right = result["measured"][-1]["right_greedy"]
        name = f"{result['arm']}, seed {result['seed']}"
        if result["arm"] == "references" and right < MIN_RIGHT:
            raise PolarError(f"{name}: {right:.1%} right, less than {MIN_RIGHT:.0%}")
        if result["arm"] == "references" and result["alarms"]:
            raise PolarError(f"{name}: the watch raised an alarm: {result['alarms'][0]}")
        if result["arm"] == "shuffled" and right > MAX_RIGHT_SHUFFLED:
            raise PolarError(f"{name}: {right:.1%} right, more than {MAX_RIGHT_SHUFFLED:.0%}")
        if result["arm"] == "hacked" and not result["alarms"]:
            raise PolarError(f"{name}: the watch raised no alarm")


def _show(results: Sequence[dict[str, Any]], seconds: float) -> None:
    table = Table("run", "seed", "right, greedy", "right, sampled", "well-formed", "reward", "watch")
    for result in results:
        before, after = result["measured"][0], result["measured"][-1]
        table.add_row(
            result["arm"],
            str(result["seed"]),
            *(
                f"{before[key]:.1%} → {after[key]:.1%}"
                for key in ("right_greedy", "right_sampled", "formed_sampled")
            ),
            f"{result['rewards'][0]:.1f} → {result['rewards'][-1]:.1f}",
            "; ".join(result["alarms"]) or "silent",
        )
    CONSOLE.print(table)
    CONSOLE.print(f"{seconds:.0f} s in all")


def _plot(results: Sequence[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"references": "tab:blue", "shuffled": "tab:gray", "hacked": "tab:red"}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for result in results:
        colour = colours[result["arm"]]
        label = result["arm"] if result["seed"] == 0 else None
        steps = [entry["step"] for entry in result["measured"]]
        left.plot(
            steps, [entry["right_greedy"] for entry in result["measured"]], "o-", color=colour, label=label
        )
        right.plot(range(1, len(result["rewards"]) + 1), result["rewards"], color=colour, label=label)
    left.axhline(1 / 6, color="black", linestyle=":", linewidth=1)
    left.set(xlabel="GRPO step", ylabel="right held-out answers (greedy)", ylim=(0, 1.02))
    right.set(xlabel="GRPO step", ylabel="mean reward")
    left.legend()
    figure.savefig(file, dpi=120)


def _run(command: Sequence[str], log: Path) -> None:
    started = time.perf_counter()
    with log.open("w") as output:
        status = subprocess.call(
            command, stdout=output, stderr=subprocess.STDOUT, env=_environment(), cwd=Path.cwd()
        )
    if status:
        raise PolarError(
            f"{log}: failed with status {status}:\n" + "\n".join(log.read_text().splitlines()[-20:])
        )
    CONSOLE.print(f"[green]✓[/] {time.perf_counter() - started:5.1f} s  {log.stem}")


def _environment() -> dict[str, str]:
    # One thread a run: more threads than cores make small models several times slower.
    variables = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return {**os.environ, **variables}


def _address(log: Path, server: subprocess.Popen[bytes]) -> str:
    until = time.monotonic() + 120
    while time.monotonic() < until and server.poll() is None:
        if " at http://" in log.read_text():
            return log.read_text().split(" at http://")[1].split()[0].rstrip("/")
        time.sleep(0.2)
    raise PolarError(f"{log}: the server did not start:\n{log.read_text()[-2000:]}")


if __name__ == "__main__":
    from polar_ft.cli import run

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    run(app)
