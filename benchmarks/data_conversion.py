"""Conversion of chat pairs: seconds and memory, of 100,000 pairs and of half as many.

    python benchmarks/data_conversion.py --json OUT

Rows are laid out as UltraFeedback Binarized, with words of real answers. Each measurement runs in a process
of its own, so that peak memory is its own. benchmarks/README.md says what each figure means.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.data_preparation import measured, real_words
from benchmarks.machine import describe_machine

WORDS = {"prompt": 40, "chosen": 90, "rejected": 70}  # about 1.7 kB a row, with the prompt three times


def write_chat_pairs(file: Path, pairs: int, seed: int = 0) -> None:
    """Rows of `chosen` and `rejected` as dialogues, each with the prompt."""
    rng = np.random.default_rng(seed)
    words = real_words()

    def text(count: int) -> str:
        start = int(rng.integers(len(words) - count))
        return " ".join(words[start : start + count])

    with file.open("w", encoding="utf-8") as lines:
        for number in range(pairs):
            question = {"role": "user", "content": text(WORDS["prompt"])}
            row: dict[str, Any] = {"prompt": question["content"], "prompt_id": str(number)}
            for side in ("chosen", "rejected"):
                row[side] = [question, {"role": "assistant", "content": text(WORDS[side])}]
            row |= {"score_chosen": 8.0, "score_rejected": float(rng.integers(1, 8))}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def converting(file: str, target: str) -> dict[str, float]:
    """Converts a file."""
    from polar_ft.data.converters import convert_file

    started, cpu_started = time.perf_counter(), time.process_time()
    done = convert_file("chat-pairs", file, Path(target))
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
        "pairs": done.pairs,
    }


def main() -> None:
    """Measures and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/benchmarks/data"))
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": describe_machine()}
    for name, pairs in (("half", args.pairs // 2), ("all", args.pairs)):
        file = args.work_dir / f"chat_{pairs}.jsonl"
        write_chat_pairs(file, pairs)
        runs = [
            measured(converting, str(file), str(args.work_dir / "converted.jsonl"))
            for _ in range(args.repeats)
        ]
        seconds, cpu = ([run[key] for run in runs] for key in ("seconds", "cpu_seconds"))
        report[name] = {
            "pairs": pairs,
            "megabytes": file.stat().st_size / 1e6,
            "seconds": seconds,
            "cpu_seconds": cpu,
            "peak_private_mib": max(run["peak_private_mib"] for run in runs),
        }
        print(
            f"{pairs:8,} pairs, {report[name]['megabytes']:5.0f} MB: median {np.median(seconds):5.2f} s "
            f"({min(seconds):.2f} to {max(seconds):.2f}), CPU {np.median(cpu):.2f} s, "
            f"private {report[name]['peak_private_mib']:.0f} MiB",
            flush=True,
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
