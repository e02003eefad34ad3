"""How long commands take to start, as ratios to ``python -c "import torch, transformers"``.

    python -m benchmarks.start_up --json benchmarks/results/start_up.json

Each round times all of them in turn; the figures are medians. Seconds depend on the machine and what else
it does, the ratios hardly. ``train`` is the time from the command to the line of its first step, of the
tiny config on the example data, which is cached as the base is; ``xtuner train`` the same of that command.
``eval`` is the time to its first line of progress, that of the first rows that are scored.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.machine import describe_machine

REPOSITORY = Path(__file__).resolve().parents[1]
CLI = [sys.executable, "-m", "polar_ft.cli"]
DATA = str(REPOSITORY / "examples/data/alpaca_train.jsonl")
HELD_OUT = str(REPOSITORY / "examples/data/alpaca_held_out.jsonl")
CONFIG = str(REPOSITORY / "configs/polar_tiny_cpu.py")
SHARED = ["--cfg-options", f"data={DATA}", "train_cfg.max_steps=1"]
BASELINE = "import torch, transformers"


def commands(folder: Path) -> dict[str, tuple[list[str], str | None]]:
    """Name to a command line, and the text after which it is timed; None for its end.

    Args:
        folder: Where it is run; holds the model that `prepare` made.
    """
    xtuner = str(Path(sys.executable).with_name("xtuner"))
    return {
        BASELINE: ([sys.executable, "-c", BASELINE], None),
        "--help": ([*CLI, "--help"], None),
        "data check, 100 rows": ([*CLI, "data", "check", "rows.jsonl"], None),
        "eval, first score": ([*CLI, "eval", "model", "rows.jsonl", "--out", "eval", "--force"], "pairs/s"),
        "train, first step": ([*CLI, "train", CONFIG, "--work-dir", "work", *SHARED], "step 1/1"),
        "xtuner train, first step": ([xtuner, "train", CONFIG, "--work-dir", "work", *SHARED], "[1/1]"),
    }


def prepare(folder: Path, environment: dict[str, str]) -> None:
    """Makes 100 rows and a model, which fills the cache of tokenized data as well."""
    rows = Path(DATA).read_text(encoding="utf-8").splitlines(keepends=True)[:100]
    (folder / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    for arguments in (
        ["train", CONFIG, "--work-dir", "first", *SHARED],
        ["convert", CONFIG, "first/iter_1.pth", "model"],
    ):
        done = subprocess.run([*CLI, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout[-2000:] + done.stderr[-2000:])


def measure(
    command: list[str], until: str | None, folder: Path, environment: dict[str, str]
) -> dict[str, float]:
    """Seconds to a text in the output (or the end), and of processor time to the end."""
    for left in ("work", "eval"):
        shutil.rmtree(folder / left, ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    reached = None
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        output = []
        for line in process.stdout:
            output.append(line)
            if until is not None and until in line and reached is None:
                reached = time.perf_counter() - started
    seconds = time.perf_counter() - started
    if process.returncode or (until is not None and reached is None):
        sys.exit(f"{' '.join(command)}: {process.returncode}\n{''.join(output)[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"seconds": seconds if reached is None else reached, "processor_seconds": used}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONUNBUFFERED": "1",
            "HOME": str(folder),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        prepare(folder, environment)
        table = commands(folder)
        rounds: dict[str, list[dict[str, float]]] = {of: [] for of in table}
        for _ in range(args.rounds):
            for of, (command, until) in table.items():
                rounds[of].append(measure(command, until, folder, environment))
    figures = {}
    for of, measured in rounds.items():
        found = {key: median(one[key] for one in measured) for key in measured[0]}
        of_baseline = [
            one["seconds"] / base["seconds"] for one, base in zip(measured, rounds[BASELINE], strict=True)
        ]
        found["ratio"] = median(of_baseline)
        figures[of] = found
        print(f"{of:28}{found['seconds']:8.2f} s{found['processor_seconds']:8.2f} s CPU{found['ratio']:8.2f}")
    if args.json:
        result = {
            "machine": describe_machine(),
            "rounds": args.rounds,
            "medians": figures,
            "measured": rounds,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
