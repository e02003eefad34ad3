"""How far the time that `polar-ft doctor` estimates is from the time that the run takes.

    python benchmarks/time_estimates.py --json OUT        three configs on a CPU, five times each

Each round asks doctor, then trains, so that both see the same load of the machine. What is compared is the
sum of the times of the steps: start, validation and saving are counted in neither.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.machine import describe_machine

REPOSITORY = Path(__file__).resolve().parents[1]
ALPACA = str(REPOSITORY / "examples/data/alpaca_train.jsonl")

# Lines of configs/polar_tiny_cpu.py that each config changes.
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny_four_epochs": dict(data=ALPACA, max_epochs=4),
    "tiny_lora_eight_epochs": dict(
        lora=dict(r=8, alpha=16), max_epochs=8, data=dict(path=ALPACA, max_samples=80)
    ),
    "tiny_small_packs": dict(
        max_packed_length=2048, global_batch_pairs=16, max_epochs=8, data=dict(path=ALPACA, max_samples=120)
    ),
}


def measured(name: str, changes: Mapping[str, Any], folder: Path, warmup_seconds: float) -> dict[str, Any]:
    """Estimate and time of one round of a config."""
    text = (REPOSITORY / "configs/polar_tiny_cpu.py").read_text(encoding="utf-8")
    for key, value in changes.items():
        text, count = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value!r}", text)
        assert count == 1, key
    # The base is made of one file.
    text = text.replace("args=dict(data=data)", f"args=dict(data={ALPACA!r})")
    config = folder / f"{name}.py"
    config.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "polar_ft.cli"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    shared = dict(cwd=folder, env=environment, capture_output=True, text=True)
    busy = psutil.cpu_percent(interval=1) / 100 * (os.cpu_count() or 1)
    asked = subprocess.run(
        [*command, "doctor", str(config), "--prepare", "--json", f"--warmup-seconds={warmup_seconds}"],
        **shared,  # type: ignore[call-overload]
    )
    found = json.loads(asked.stdout)["time"]
    work_dir = folder / f"work_{name}"
    trained = subprocess.run([*command, "train", str(config), "--work-dir", str(work_dir)], **shared)  # type: ignore[call-overload]
    if trained.returncode:
        sys.exit(trained.stdout[-2000:] + trained.stderr[-2000:])
    (scalars,) = sorted(work_dir.glob("*/vis_data/*.json"), key=os.path.getmtime)[-1:]
    steps = [row["time"] for line in scalars.read_text().splitlines() if "time" in (row := json.loads(line))]
    return {
        "estimate_s": found["seconds"],
        "threads": found["warmup"]["threads"],
        "steps": len(steps),
        "took_s": sum(steps),
        "error": found["seconds"] / sum(steps) - 1,
        "cores_busy_before": busy,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup-seconds", type=float, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in CONFIGS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for name, changes in CONFIGS.items():
                of_round = Path(folder, str(number))
                of_round.mkdir(exist_ok=True)
                rounds[name].append(measured(name, changes, of_round, args.warmup_seconds))
                print(name, json.dumps(rounds[name][-1]), flush=True)
                errors = {name: [one["error"] for one in found] for name, found in rounds.items() if found}
                result = {
                    "machine": describe_machine(),
                    "warmup_seconds": args.warmup_seconds,
                    "largest_abs_error": max(abs(error) for found in errors.values() for error in found),
                    "median_abs_error": median(abs(error) for found in errors.values() for error in found),
                    "configs": rounds,
                }
                if args.json is not None:
                    args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
