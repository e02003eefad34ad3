"""A whole reinforcement fine-tuning on a CPU: a careless policy learns to read its catalogue.

    make demo                                  # trains the reward model, once
    tools/rft_env.sh trl                       # installs TRL in an environment of its own, once
    python examples/rft/tiny/run.py            # about 5 minutes on two cores

For each seed: a policy is supervised on a careless clerk's answers, then trained by TRL's GRPO with the
demo's reward model behind `polar-ft serve`; once with the right references and once with those of other
products, from which nothing can be learned. One more run, of 60 steps with those, without a KL term and with
a higher learning rate, is what reward hacking looks like. The floor is compared with the rewards of right,
wrong and empty answers.

The figures of the documentation are copied from there:

    cp work_dirs/rft_tiny/rft.json benchmarks/results/rft_tiny.json
    cp work_dirs/rft_tiny/rft.png docs/images/rft_tiny.png
    python benchmarks/docs_figures.py
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
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
MEASURED = ("right_greedy", "right_sampled", "formed_sampled")
CONSOLE = Console(highlight=False)

# The arguments of each kind of run.
ARMS: dict[str, list[str]] = {
    "references": [],
    "shuffled": ["--shuffled"],
    # Nothing but pleasing the reward model raises its rewards, and nothing holds the policy back.
    "hacked": ["--shuffled", "--beta", "0", "--lr", "5e-4", "--steps", "60"],
}
LABELS = {
    "references": ("tab:blue", "references"),
    "shuffled": ("tab:gray", "shuffled references"),
    "hacked": ("tab:red", "shuffled, without a KL term"),
}


def main(
    out: Annotated[Path, typer.Option(help="Folder for everything.")] = Path("work_dirs/rft_tiny"),
    demo: Annotated[Path, typer.Option(help="The demo's domain_rm folder.")] = Path(
        "work_dirs/demo/domain_rm"
    ),
    environment: Annotated[Path, typer.Option(help="Environment with TRL.")] = Path(".venv-rft/trl"),
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    steps: Annotated[int, typer.Option(min=4, help="GRPO steps of a run.")] = 40,
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 2,
) -> None:
    """Runs everything, draws rft.png and writes rft.json."""
    if not (demo / "model" / "config.json").is_file():
        raise PolarError(f"{demo}: has no reward model; run make demo first")
    if not (environment / "bin" / "python").exists():
        raise PolarError(f"{environment}: has no TRL; run tools/rft_env.sh trl first")
    started, load = time.perf_counter(), os.getloadavg()[0]
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
            server_of_rewards = ["--model", str(model), "--server", address]
            floor = out / "floor.json"
            _run([python, SCRIPT, "floor", data, str(floor), *server_of_rewards], out / "floor.log")

            def train(run: tuple[str, int]) -> dict[str, Any]:
                arm, seed = run
                folder = out / f"{arm}{seed}"
                folder.mkdir()
                command = [python, SCRIPT, "train", data, str(out / f"policy{seed}"), str(folder)]
                command += [*server_of_rewards, "--seed", str(seed), "--steps", str(steps)]
                _run([*command, *ARMS[arm]], out / f"{folder.name}.log")
                result = json.loads((folder / "result.json").read_text())
                # A line of the watch is a step.
                lines = read_watch(folder / "watch")
                first = next((step for step in range(1, len(lines) + 1) if alarms(lines[:step])), None)
                return {
                    "arm": arm,
                    "seed": seed,
                    **result,
                    "repetition": [line.repetition for line in lines],
                    "alarms": alarms(lines),
                    "first_alarm": first,
                }

            runs = [(arm, seed) for seed in range(seeds) for arm in ("references", "shuffled")] + [
                ("hacked", 0)
            ]
            results = list(pool.map(train, runs))
        finally:
            server.terminate()
            server.wait(30)

    seconds = time.perf_counter() - started
    written = {
        "command": f"examples/rft/tiny/run.py --seeds {seeds} --steps {steps} --workers {workers}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"load {load:.1f} at the start",
        "seconds": seconds,
        "minutes": seconds / 60,
        "steps": steps,
        "summary": {arm: _summary([run for run in results if run["arm"] == arm]) for arm in ARMS},
        "floor": json.loads(floor.read_text()),
        "runs": results,
    }
    (out / "rft.json").write_text(json.dumps(written, indent=1) + "\n")
    _plot(results, out / "rft.png")
    _show(results, seconds)
    _check(results, written["floor"])


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean of the runs of one kind before and after, and the lowest and highest at the end."""
    found: dict[str, Any] = {"first_alarm": runs[0]["first_alarm"]}
    series = {key: [[entry[key] for entry in run["measured"]] for run in runs] for key in MEASURED}
    series |= {key: [run[key] for run in runs] for key in ("rewards", "repetition")}
    for key, values in series.items():
        ends = [value[-1] for value in values]
        found[key] = {
            "before": fmean(value[0] for value in values),
            "after": fmean(ends),
            "lowest": min(ends),
            "highest": max(ends),
        }
    return found


def _check(results: Sequence[dict[str, Any]], floor: dict[str, Any]) -> None:
    """Raises PolarError where a run did not do what it is to show."""
    if floor["floor"] >= floor["wrong"]["lowest"]:
        raise PolarError(f"the floor {floor['floor']:.1f} is above the lowest reward of a wrong answer")
    for result in results:
        right = result["measured"][-1]["right_greedy"]
        name = f"{result['arm']}, seed {result['seed']}"
        if result["arm"] == "references" and right < MIN_RIGHT:
            raise PolarError(f"{name}: {right:.1%} right, less than {MIN_RIGHT:.0%}")
        if result["arm"] == "references" and result["first_alarm"] is not None:
            raise PolarError(f"{name}: the watch raised an alarm at step {result['first_alarm']}")
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
            *(f"{before[key]:.1%} → {after[key]:.1%}" for key in MEASURED),
            f"{result['rewards'][0]:.1f} → {result['rewards'][-1]:.1f}",
            "silent" if result["first_alarm"] is None else f"alarm at step {result['first_alarm']}",
        )
    CONSOLE.print(table)
    CONSOLE.print(f"{seconds:.0f} s in all")


def _plot(results: Sequence[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (right, reward, repeated) = pyplot.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    for result in results:
        colour, name = LABELS[result["arm"]]
        label = name if result["seed"] == 0 else None
        steps = [entry["step"] for entry in result["measured"]]
        greedy = [entry["right_greedy"] for entry in result["measured"]]
        right.plot(steps, greedy, "o-", color=colour, label=label, markersize=4)
        for axes, figures in ((reward, result["rewards"]), (repeated, result["repetition"])):
            axes.plot(range(1, len(figures) + 1), figures, color=colour, linewidth=1.2, alpha=0.8)
        if result["first_alarm"] is not None:
            repeated.axvline(
                result["first_alarm"], color=colour, linestyle="--", linewidth=1, label="first alarm"
            )
    right.axhline(1 / 6, color="black", linestyle=":", linewidth=1, label="guessing")
    right.set(xlabel="GRPO step", title="right answers about unseen products (greedy)", ylim=(-0.02, 1.02))
    reward.set(xlabel="GRPO step", title="mean reward of the policy's answers")
    repeated.set(xlabel="GRPO step", title="repeated word pairs (the watch)", ylim=(-0.02, 1.02))
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
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
