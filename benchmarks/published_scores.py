"""Result files that RMB and JudgeBench publish, read as by `polar-ft eval --from-scores`: the same figures?

    python benchmarks/published_scores.py --rmb CLONE --judgebench CLONE

CLONE is a clone of Zhou-Zoey/RMB-Reward-Model-Benchmark and of ScalerLab/JudgeBench. For each result file of
a reward model the accuracy is compared with the one that the benchmark's own marks give: `is_correct` in RMB,
`decision` against `label` in JudgeBench. Exit status 1 where one differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from polar_ft.evaluation.scores_file import read_scores


def published(rmb: Path | None, judgebench: Path | None) -> Iterator[tuple[Path, list[bool]]]:
    """Each result file with what the benchmark says of each of its pairs."""
    for file in sorted((rmb / "eval" / "result").glob("*.json")) if rmb else ():
        yield file, [bool(row["is_correct"]) for row in json.loads(file.read_text())]
    for file in (
        sorted((judgebench / "outputs").glob("*judge_name=reward_model*.jsonl")) if judgebench else ()
    ):
        rows = map(json.loads, file.read_text().splitlines())
        yield file, [row["judgments"][0]["decision"] == row["label"] for row in rows]


def main() -> int:
    """Prints a line for each file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("--rmb", "--judgebench"):
        parser.add_argument(name, type=Path, metavar="CLONE")
    arguments = parser.parse_args()
    n_files, differs = 0, False
    for file, correct in published(arguments.rmb, arguments.judgebench):
        ours = float(np.mean(read_scores(file).table.margins > 0))
        theirs = sum(correct) / len(correct)
        print(f"{file.name}: {len(correct)} pairs, published {theirs:.6f}, here {ours:.6f}")
        n_files, differs = n_files + 1, differs or ours != theirs
    if not n_files:
        parser.error("no result file found: name a clone with --rmb or --judgebench")
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
