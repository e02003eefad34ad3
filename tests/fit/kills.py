"""Kills a fit at random moments, continues it with the same command, and looks at how it ends.

    python -m tests.fit.kills --kills 20 --seed 0 --out work_dirs/fit_kills

A tiny fit of the catalogue (examples/domain_rm) runs once without interruption, and once killed again and
again by SIGKILL at random moments. Weights, scores and the data files have to be the same bytes.
``summary.json`` in the folder holds what was counted.
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
from collections.abc import Sequence
from pathlib import Path

import psutil

from examples.domain_rm.make_data import write_data
from polar_ft.fit.steps import content_of

SETTINGS = ("max_epochs=1", "save_steps=2", "val_interval=2", "global_batch_pairs=32")


def command(data: Path, out: Path) -> list[str]:
    """The same for the first start and for every later one."""
    settings = [text for setting in SETTINGS for text in ("--set", setting)]
    return [sys.executable, "-m", "polar_ft.cli", "fit", str(data), "--out", str(out), "--yes", *settings]


def environment(home: Path) -> dict[str, str]:
    """With a home of its own, so that no cache of scores is shared."""
    home.mkdir(parents=True, exist_ok=True)
    return {**os.environ, "HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def current_step(out: Path) -> str:
    """The step that was begun last and is not done."""
    try:
        record = json.loads((out / "fit.json").read_text())
    except (OSError, ValueError):
        return ""
    undone = [name for name in record["begun"] if name not in record["done"]]
    return undone[-1] if undone else ""


def killed(arguments: Sequence[str], env: dict[str, str], out: Path, seconds: float) -> str | None:
    """Starts a fit and kills it after so many seconds.

    Returns:
        The step in which it was killed; None if it ended before.
    """
    with out.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen(arguments, env=env, stdout=log, stderr=log)
        try:
            if process.wait(timeout=seconds):
                raise RuntimeError(f"status {process.returncode}; see {out.with_suffix('.log')}")
            return None
        except subprocess.TimeoutExpired:
            found = current_step(out) or "between steps"
    # Only the process that the user started: what it has started has to end by itself.
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    if alive:
        raise RuntimeError(f"still alive 20 s after the kill: {[p.cmdline() for p in alive]}")
    return found


def ends(out: Path) -> dict[str, object]:
    """What has to be the same at the end."""
    folders = {name: content_of(out / name) for name in ("data", "model", "base")}
    folders["model"].pop("README.md")  # has the name of the folder
    return folders | {"scores": content_of(out / "eval" / "model" / "scores.jsonl")}


def main(kills: int, seed: int, out: Path) -> int:
    """Runs both fits; returns the number of differences."""
    shutil.rmtree(out, ignore_errors=True)
    data, _ = write_data(out / "source", n_train=400, n_held_out=8)
    env = environment(out / "home")
    whole, again = out / "whole", out / "killed"
    started = time.monotonic()
    subprocess.run(command(data, whole), env=env, check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - started
    env = environment(out / "home2")
    draw, steps, ended, different = random.Random(seed), [], 0, set()

    def compare() -> None:
        nonlocal ended
        ended += 1
        first, second = ends(whole), ends(again)
        different.update(name for name in first if first[name] != second[name])
        shutil.rmtree(again)

    while len(steps) < kills:
        found = killed(command(data, again), env, again, draw.uniform(0, seconds))
        if found is None:
            compare()
        else:
            steps.append(found)
            print(f"killed in {found}", flush=True)
    subprocess.run(command(data, again), env=env, check=True, stdout=subprocess.DEVNULL)
    compare()
    summary = {
        "kills": len(steps),
        "steps": Counter(steps),
        "fits_ended": ended,
        "whole_s": round(seconds, 1),
        "different": sorted(different),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary))
    return len(different)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("work_dirs/fit_kills"))
    asked = parser.parse_args()
    sys.exit(main(asked.kills, asked.seed, asked.out))
