"""Kills a training run at random moments, starts it again with the same command, and looks at how it ends.

    python -m tests.reliability.supervisor --kills 20 --seed 0 --out work_dirs/reliability

trains the tiny model on 2 ranks with ZeRO-2 and with ZeRO-3: once without interruption, then killed by turns
while it starts up, in a step, while it saves and while it validates, each time at a random moment of that
phase. Final weights, optimizer state and the loss of every step have to be the same bits. Then every file of
the newest checkpoint is damaged in many ways. ``summary.json`` in the folder holds what was counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import torch
from xtuner.configs import cfgs_name_path

from polar_ft.conversion.checkpoint import read_checkpoint
from polar_ft.conversion.checkpoint_files import checkpoints, manifest_path, newest_complete, verify
from polar_ft.conversion.restricted_load import restricted_load
from polar_ft.errors import PolarError
from polar_ft.model.tiny_base import make_tiny_base
from polar_ft.training.ranks import FOLDER_VARIABLE, beats
from tests.damage import damaged
from tests.training.runs import REPOSITORY, edit_config, make_rows, write_rows

PHASES = ("start-up", "step", "save", "validation")


@dataclass
class Supervised:
    """One run that was killed again and again.

    Attributes:
        kills: How often it was killed.
        starts: How often it was started.
        phases: What it was doing when it was killed.
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
        differences: In how many tensors and losses killed runs differ from the uninterrupted ones.
        corruptions_tried: Damages to files of checkpoints.
        corruptions_loaded_wrong: Of those, how many a resume or a conversion took for whole.
        starts: How often a run was started, uninterrupted ones left out.
        phases: Kills by what the run was doing.
        whole_run_s: Seconds of the uninterrupted run of each stage.
        details: Each difference and each damage that was loaded.
    """

    kills: int = 0
    differences: int = 0
    corruptions_tried: int = 0
    corruptions_loaded_wrong: int = 0
    starts: int = 0
    phases: dict[str, int] = field(default_factory=dict)
    whole_run_s: dict[str, float] = field(default_factory=dict)
    details: list[str] = field(default_factory=list)


def write_project(folder: Path, **lines: object) -> Path:
    """A tiny base, rows, validation rows and a config; the config's path."""
    folder.mkdir(parents=True)
    rows = make_rows(60)
    base = make_tiny_base(
        folder / "base", [t for row in rows for t in row.values()], vocab_size=400, hidden=32
    )
    data = write_rows(folder / "rows.jsonl", rows)
    # Prompts of the training data are refused here.
    others = [row | {"prompt": f"Again: {row['prompt']}"} for row in rows[:12]]
    held_out = write_rows(folder / "held_out.jsonl", others)
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
        "TMPDIR": str(home),
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

    A run that goes on from near its end may end before its moment has come; then there are fewer kills than
    asked for.

    Args:
        arguments: The command, the same for every start.
        env: Its environment.
        work_dir: Of the run.
        kills: How many, by turns in each of `PHASES`.
        seconds: That the whole run takes, from which the moments of a start-up are drawn.
        seed: Of the moments.
    """
    draw = random.Random(seed)
    log = work_dir.with_suffix(".log")
    done = Supervised(0, 0, [], work_dir)
    while done.kills < kills:
        phase = PHASES[(seed + done.kills) % len(PHASES)]
        with log.open("ab") as output:
            process = subprocess.Popen(arguments, env=env, stdout=output, stderr=output)
        done.starts += 1
        if wait_for(process, phase, seconds, draw):
            found = what_it_does(process)
            kill_tree(process.pid)
            process.wait()
            done.kills += 1
            done.phases.append(found)
            continue
        if process.returncode:
            raise RuntimeError(f"status {process.returncode}; {log.read_text(errors='replace')[-3000:]}")
        break
    run_whole(arguments, env, log)
    done.starts += 1
    return done


def wait_for(process: subprocess.Popen[bytes], phase: str, seconds: float, draw: random.Random) -> bool:
    """Waits for a random moment of a phase; False if the process ended before."""
    if phase == "start-up":
        try:
            process.wait(timeout=draw.uniform(0.0, 0.35) * seconds)
        except subprocess.TimeoutExpired:
            return True
        return False
    # The so many-th time that it comes to this phase, then somewhere within it: all of them are short.
    times, now, before = draw.randint(1, 4 if phase == "step" else 2), "", ""
    while times and process.poll() is None:
        before, now = now, what_it_does(process)
        times -= now == phase != before
        time.sleep(0.002)
    time.sleep(draw.uniform(0.0, 0.1))
    return process.poll() is None


def what_it_does(process: subprocess.Popen[bytes]) -> str:
    """One of `PHASES`, by what the first rank told last."""
    try:
        for child in psutil.Process(process.pid).children(recursive=True):
            folder = Path(child.environ().get(FOLDER_VARIABLE, ""))
            if folder.name and (told := beats(folder)):
                names = {"starting": "start-up", "saving": "save", "validating": "validation"}
                return names.get(told[0].phase, "step")
    except (psutil.Error, OSError):  # ends just now
        pass
    return "start-up"


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and everything below it."""
    root = psutil.Process(pid)
    for process in [*root.children(recursive=True), root]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


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


def corrupt(whole: Path, scratch: Path, seed: int) -> tuple[int, list[str]]:
    """Damages each file of a run's newest checkpoint in turn.

    Returns:
        How many damages were tried, and those that were not noticed though a file of the state had changed.
    """
    newest, before = (Path(shutil.copytree(path, scratch / path.name)) for path in checkpoints(whole)[:2])
    draw = random.Random(seed)
    tried, wrong = 0, []
    for file in sorted(path for path in newest.rglob("*") if path.is_file()):
        # A manifest can be hurt without harm: where it still can be read, it still tells what was saved.
        harmful = file != manifest_path(newest)
        for damage in damaged(file, before / file.relative_to(newest), draw, flips=6):
            tried += 1
            for name, load in (
                ("--resume auto", lambda: newest_complete(scratch, lambda _: None) == newest),
                ("--resume PATH", lambda: verify(newest) is not None),
                ("convert", lambda: bool(read_checkpoint(newest).tensors)),
            ):
                try:
                    loaded = load()
                except PolarError:
                    loaded = False
                if loaded and harmful:
                    wrong.append(f"{name}: {newest.name}/{file.name}: {damage}")
            if harmful and newest_complete(scratch, lambda _: None) != before:
                wrong.append(f"--resume auto did not fall back: {newest.name}/{file.name}: {damage}")
    shutil.rmtree(scratch)
    return tried, wrong


def supervise(folder: Path, stages: Sequence[int], kills: int, seed: int, epochs: int) -> Summary:
    """Everything for each ZeRO stage; returns what was counted."""
    config = write_project(folder / "project", max_epochs=epochs)
    summary = Summary()
    phases: Counter[str] = Counter()
    for stage in stages:
        env = environment(folder / "project", ranks=2)
        whole = folder / f"zero{stage}_whole"
        seconds = run_whole(command(config, stage, whole), env, whole.with_suffix(".log"))
        summary.whole_run_s[f"zero{stage}"] = round(seconds, 1)
        wanted, rounds = summary.kills + kills, 0
        while summary.kills < wanted:
            killed = folder / f"zero{stage}_killed_{rounds}"
            done = run_with_kills(
                command(config, stage, killed),
                env,
                killed,
                kills=wanted - summary.kills,
                seconds=seconds,
                seed=seed + 100 * stage + rounds,
            )
            rounds += 1
            summary.kills += done.kills
            summary.starts += done.starts
            phases.update(done.phases)
            found = differences(killed, whole)
            summary.differences += len(found)
            summary.details += [f"zero{stage}: {difference}" for difference in found]
            print(f"ZeRO-{stage}: {summary.kills} kills, {summary.differences} differences", flush=True)
        tried, wrong = corrupt(whole, folder / "damaged", seed)
        summary.corruptions_tried += tried
        summary.corruptions_loaded_wrong += len(wrong)
        summary.details += [f"zero{stage}: {damage}" for damage in wrong]
        print(f"ZeRO-{stage}: {tried} damages, {len(wrong)} loaded wrong", flush=True)
    summary.phases = dict(phases)
    return summary


def main() -> None:
    """The long version, of ``make test-reliability``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="for each ZeRO stage")
    parser.add_argument("--seed", type=int, default=0)
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
    sys.exit(1 if summary.differences or summary.corruptions_loaded_wrong else 0)


if __name__ == "__main__":
    main()
