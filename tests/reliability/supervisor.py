"""Kills a training run at random moments, starts it again with the same command, and looks at how it ends.

    python -m tests.reliability.supervisor --kills 20 --seed 0 --out work_dirs/reliability

trains the tiny model on 2 ranks with ZeRO-2 and with ZeRO-3: once without interruption, then with kills at
moments drawn from the time that the whole run takes. Final weights, optimizer state and the loss of every
step have to be the same bits. ``summary.json`` in the folder holds what was counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import torch
from xtuner.configs import cfgs_name_path

from polar_ft.conversion.restricted_load import restricted_load
from polar_ft.model.tiny_base import make_tiny_base
from tests.training.runs import REPOSITORY, edit_config, make_rows, write_rows


@dataclass
class Supervised:
    """One run that was killed again and again.

    Attributes:
        kills: How often it was killed.
        starts: How often it was started.
        phases: What it was doing when it was killed, by its last line of output.
        work_dir: Its work folder.
    """

    kills: int
    starts: int
    phases: list[str]
    work_dir: Path


@dataclass
class Summary:
    """What ``summary.json`` holds; of all stages together.

    Attributes:
        kills: How often a run was killed.
        starts: How often one was started, uninterrupted runs left out.
        differences: What differs from the uninterrupted runs.
        phases: The last line of output before each kill.
        whole_run_s: Seconds of the uninterrupted run of each stage.
    """

    kills: int = 0
    starts: int = 0
    differences: list[str] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)
    whole_run_s: dict[str, float] = field(default_factory=dict)


def write_project(folder: Path, **lines: object) -> Path:
    """A tiny base, rows, validation rows and a config; the config's path."""
    folder.mkdir(parents=True)
    rows = make_rows(60)
    base = make_tiny_base(
        folder / "base", [t for row in rows for t in row.values()], vocab_size=400, hidden=32
    )
    data = write_rows(folder / "rows.jsonl", rows)
    held_out = write_rows(folder / "held_out.jsonl", rows[:12])
    for stage in (2, 3):
        settings = json.loads(Path(cfgs_name_path["deepspeed_zero2"]).read_text())
        settings["zero_optimization"] = {"stage": stage}
        for half in ("fp16", "bf16"):
            settings.pop(half)
        (folder / f"zero{stage}.json").write_text(json.dumps(settings))
    settings = dict(
        pretrained_model_name_or_path=str(base),
        data=str(data),
        val_data=str(held_out),
        val_interval=3,
        lr=1e-2,
        max_epochs=3,
        global_batch_pairs=10,
        max_packed_length=512,
        save_steps=2,
    )
    return edit_config("polar_tiny_cpu.py", folder / "config.py", **(settings | lines))


def command(config: Path, stage: int | None, work_dir: Path) -> list[str]:
    """The same command for the first start and for every later one."""
    deepspeed = [] if stage is None else ["--deepspeed", str(config.with_name(f"zero{stage}.json"))]
    program = Path(sys.executable).with_name("polar-ft")
    return [str(program), "train", str(config), "--work-dir", str(work_dir), "--resume", "auto", *deepspeed]


def environment(home: Path, ranks: int) -> dict[str, str]:
    """As a user's, with a home of its own."""
    return {
        **os.environ,
        "HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "NPROC_PER_NODE": str(ranks),
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONUNBUFFERED": "1",
    }


def run_whole(arguments: Sequence[str], env: Mapping[str, str], log: Path) -> float:
    """Runs to the end without interruption; returns the seconds that it took."""
    started = time.monotonic()
    with log.open("ab") as output:
        status = subprocess.run(arguments, env=env, stdout=output, stderr=output, check=False).returncode
    if status:
        raise RuntimeError(f"status {status}; the end of {log}:\n{log.read_text(errors='replace')[-3000:]}")
    return time.monotonic() - started


def run_with_kills(
    arguments: Sequence[str], env: Mapping[str, str], work_dir: Path, *, kills: int, seconds: float, seed: int
) -> Supervised:
    """Starts the run again and again; each start but the last is killed at a random moment.

    Runs get nearer to their end with every start, so a start may end before its moment has come; then there
    are fewer kills than asked for.
    """
    draw = random.Random(seed)
    log = work_dir.with_suffix(".log")
    done = Supervised(0, 0, [], work_dir)
    while done.kills < kills:
        with log.open("ab") as output:
            process = subprocess.Popen(arguments, env=env, stdout=output, stderr=output)
        done.starts += 1
        try:
            process.wait(timeout=draw.uniform(0.05, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            kill_tree(process.pid)
            process.wait()
            done.kills += 1
            done.phases.append(last_line(log))
            continue
        if process.returncode:
            raise RuntimeError(f"status {process.returncode}; {log.read_text(errors='replace')[-3000:]}")
        break
    run_whole(arguments, env, log)
    done.starts += 1
    return done


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and everything below it."""
    root = psutil.Process(pid)
    for process in [*root.children(recursive=True), root]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def last_line(log: Path) -> str:
    """The last line of a log, shortened."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][-90:] if lines else ""


def differences(killed: Path, whole: Path) -> list[str]:
    """What differs between the ends of two runs: tensors of checkpoints, losses of steps."""
    found = []
    ours, theirs = (Path((folder / "last_checkpoint").read_text()) for folder in (killed, whole))
    if ours.name != theirs.name:
        return [f"ended with {ours.name} instead of {theirs.name}"]
    for file in sorted(theirs.rglob("*.pt")) if theirs.is_dir() else [theirs]:
        other = ours / file.relative_to(theirs) if theirs.is_dir() else ours
        if not other.is_file():
            found.append(f"{other} is missing")
            continue
        a, b = tensors(restricted_load(other)), tensors(restricted_load(file))
        found += [f"{file.name}: {name}" for name in sorted(set(a) ^ set(b))]
        found += [f"{file.name}: {name}" for name in a if name in b and not same(a[name], b[name])]
    losses_a, losses_b = losses(killed), losses(whole)
    steps = sorted(set(losses_a) | set(losses_b))
    found += [f"loss of step {step}" for step in steps if losses_a.get(step) != losses_b.get(step)]
    return found


def tensors(state: object, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors in a nested state, by their path; what belongs to a moment (times, names) is no tensor."""
    if isinstance(state, torch.Tensor):
        return {name: state}
    items: list[tuple[object, object]] = []
    if isinstance(state, Mapping):
        items = list(state.items())
    elif isinstance(state, (list, tuple)):
        items = list(enumerate(state))
    return {path: t for key, value in items for path, t in tensors(value, f"{name}/{key}").items()}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, NaN included."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and bool(torch.equal(a.view(-1).nan_to_num(), b.view(-1).nan_to_num()))
    )


def losses(work_dir: Path) -> dict[int, float]:
    """The loss of every step; of a step that several starts have run, the last one's."""
    found: dict[int, float] = {}
    for file in sorted(work_dir.glob("*/vis_data/scalars.json")):
        for line in file.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the line that a kill cut
                continue
            if "loss" in entry:
                found[entry["step"]] = entry["loss"]
    return found


def supervise(folder: Path, stages: Sequence[int], kills: int, seed: int, epochs: int) -> Summary:
    """Everything for each ZeRO stage; returns what was counted."""
    config = write_project(folder / "project", max_epochs=epochs)
    summary = Summary()
    for stage in stages:
        env = environment(folder / "project", ranks=2)
        whole = folder / f"zero{stage}_whole"
        seconds = run_whole(command(config, stage, whole), env, whole.with_suffix(".log"))
        summary.whole_run_s[f"zero{stage}"] = round(seconds, 1)
        rounds = 0
        while summary.kills < kills * (stages.index(stage) + 1):
            killed = folder / f"zero{stage}_killed_{rounds}"
            done = run_with_kills(
                command(config, stage, killed),
                env,
                killed,
                kills=kills * (stages.index(stage) + 1) - summary.kills,
                seconds=seconds,
                seed=seed + 100 * stage + rounds,
            )
            rounds += 1
            summary.kills += done.kills
            summary.starts += done.starts
            summary.phases += [f"zero{stage}: {phase}" for phase in done.phases]
            summary.differences += [f"zero{stage}: {found}" for found in differences(killed, whole)]
            print(f"ZeRO-{stage}: {summary.kills} kills, {len(summary.differences)} differences", flush=True)
    return summary


def main() -> None:
    """The long version, of ``make test-reliability``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="for each ZeRO stage")
    parser.add_argument("--seed", type=int, default=0)
    # Long enough that about half of the moments lie behind the start-up.
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("work_dirs/reliability"))
    args = parser.parse_args()
    if args.out.exists():
        sys.exit(f"{args.out} is there already; remove it or name another --out")
    args.out.mkdir(parents=True)
    summary = supervise(args.out.absolute(), (2, 3), args.kills, args.seed, args.epochs)
    text = json.dumps(asdict(summary), indent=1)
    (args.out / "summary.json").write_text(f"{text}\n")
    print(text)
    sys.exit(1 if summary.differences else 0)


if __name__ == "__main__":
    main()
