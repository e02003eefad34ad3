"""Published figures of JudgeBench and RMB, recomputed by this package from clones of their repositories.

    python benchmarks/published_figures.py --judgebench CLONE --rmb CLONE --json OUT

A clone is what `git clone` gives of ScalerLab/JudgeBench and Zhou-Zoey/RMB-Reward-Model-Benchmark. Each
figure is computed twice, from the published rows as their own code does, and by converting the rows and
evaluating them here; the exit status is 1 if one differs. benchmarks/README.md says what the figures are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from polar_ft.data.converters import convert_file
from polar_ft.data.reading import read_examples, read_rows
from polar_ft.evaluation.figures import compute_figures
from polar_ft.evaluation.pairs import RMB, Ranking
from polar_ft.evaluation.scores_file import read_scores
from polar_ft.evaluation.statistics.benchmarks import rmb

JUDGEBENCH_SOURCES = {
    "Knowledge": "mmlu-pro",
    "Reasoning": "livebench-reasoning",
    "Math": "livebench-math",
    "Coding": "livecodebench",
}
FLIPPED = {"A>B": "B>A", "B>A": "A>B"}

# (what, name, published code's figure in %, ours in %, rows)
Figure = tuple[str, str, float, float, int]


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSON list or of JSON lines."""
    return [row for _, row in read_rows(file) if isinstance(row, dict)]


def judgebench(clone: Path, work: Path) -> Iterator[Figure]:
    """Accuracy of the reward models whose scores are in outputs/, on the pairs in data/, by category."""
    records = sorted(clone.glob("outputs/*judge_name=reward_model*.jsonl"))
    if not records:
        raise SystemExit(f"{clone}: no outputs/*judge_name=reward_model*.jsonl; is it a clone of JudgeBench?")
    for record in records:
        model = record.stem.partition("judge_model=")[2]
        data = clone / "data" / f"{record.stem.partition(',judge_name=')[0]}.jsonl"
        convert_file("judgebench", str(data), work / "pairs.jsonl")
        judged = {row["pair_id"]: row for row in rows_of(record)}
        with (work / "scores.jsonl").open("w") as lines:
            for example in read_examples(work / "pairs.jsonl"):
                row = judged[example.id]
                scores = dict(
                    zip(
                        (row["response_A"], row["response_B"]),
                        row["judgments"][0]["judgment"]["scores"],
                        strict=True,
                    )
                )
                chosen, rejected = (scores[text] for text in example.candidates)
                fields = {"id": example.id, "subset": example.extra["category"]}
                lines.write(json.dumps(fields | {"chosen_score": chosen, "rejected_score": rejected}) + "\n")
        figures = compute_figures(read_scores(work / "scores.jsonl").table, samples=10)
        ours = {name: part.accuracy for name, part in figures.subsets["subset"].subsets.items()}
        ours["Overall"] = figures.overall.accuracy
        for category, source in (JUDGEBENCH_SOURCES | {"Overall": ""}).items():
            right = [
                _is_right(row["judgments"], row["label"])
                for row in judged.values()
                if row["source"].startswith(source)
            ]
            yield (
                f"JudgeBench, {model}",
                category,
                100 * float(np.mean(right)),
                100 * (ours[category] or 0.0),
                len(right),
            )


def _is_right(judgments: list[dict[str, Any]], label: str) -> bool:
    """compute_final_metrics of utils/metrics.py: of both orders, more decisions are right than wrong."""
    decisions = [judgment["decision"] for judgment in judgments]
    decisions[1:] = [FLIPPED[decision] for decision in decisions[1:]]
    return sum(1 if decision == label else -1 for decision in decisions) > 0


# Nobody has published the scores behind RMB's best-of-N figures, so these score the answers in their place.
STAND_INS: dict[str, Callable[[str], float]] = {
    "length of the answer": len,
    "hash of the answer": lambda text: int(hashlib.sha256(text.encode()).hexdigest()[:8], 16),
}


def rmb_best_of_n(clone: Path, work: Path) -> Iterator[Figure]:
    """Best-of-N accuracy by category and goal, for scores that need no model."""
    folder = clone / "RMB_dataset" / "BoN_set"
    if not folder.is_dir():
        raise SystemExit(f"{folder}: no such folder; is {clone} a clone of RMB-Reward-Model-Benchmark?")
    convert_file("rmb-bon", str(folder), work / "ranked.jsonl")
    examples = list(read_examples(work / "ranked.jsonl", pairing="all"))
    published = [row for file in sorted(folder.rglob("*.json")) for row in rows_of(file)]
    for name, score in STAND_INS.items():
        summary = rmb(
            [
                Ranking(
                    id=example.id,
                    subset=example.subset,
                    prompt=number,
                    model_scores=np.array([float(score(text)) for text in example.candidates]),
                    given=np.array([float(info["score"]) for info in example.candidate_info]),
                    info=list(example.candidate_info),
                    benchmark=RMB,
                )
                for number, example in enumerate(examples)
            ]
        )
        assert summary is not None
        ours = summary.subsets | {goal: figures.accuracy for goal, figures in summary.goals.items()}
        right: dict[str, list[bool]] = defaultdict(list)
        for row in published:
            best = score(row["bon_best"]["answer"])
            # arXiv 2410.09893, best-of-N evaluation: the winner is above every loser of its list.
            is_right = all(best > score(loser["answer"]) for loser in row["loser_list"])
            _, goal, category, *_ = row["category_path"].split("/")
            for part in (goal, f"{goal}/{category}"):
                right[part].append(is_right)
        for part in sorted(right):
            yield (
                f"RMB best of N, {name}",
                part,
                100 * float(np.mean(right[part])),
                100 * ours[part],
                len(right[part]),
            )


def rmb_recorded(clone: Path, work: Path) -> Iterator[Figure]:
    """Accuracy of the reward models in eval/result, whose files say of each pair whether it is right."""
    for record in sorted(clone.glob("eval/result/*_result.json")):
        rows = rows_of(record)
        with (work / "scores.jsonl").open("w") as lines:
            for row in rows:
                scores = {"chosen_score": row["chosen_reward"], "rejected_score": row["reject_reward"]}
                lines.write(json.dumps({"id": row["pair_uid"]} | scores) + "\n")
        ours = compute_figures(read_scores(work / "scores.jsonl").table, samples=10).overall.accuracy
        subset = rows[0]["category_path"].partition("/")[2]
        right = float(np.mean([row["is_correct"] for row in rows]))
        yield f"RMB pairs, {record.stem}", subset, 100 * right, 100 * (ours or 0.0), len(rows)


def main() -> None:
    """Prints the figures side by side and writes them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--judgebench", type=Path, help="clone of ScalerLab/JudgeBench")
    parser.add_argument("--rmb", type=Path, help="clone of Zhou-Zoey/RMB-Reward-Model-Benchmark")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    parts = [
        (args.judgebench, judgebench),
        (args.rmb, rmb_recorded),
        (args.rmb, rmb_best_of_n),
    ]
    if not any(clone for clone, _ in parts):
        parser.error("name a clone: --judgebench or --rmb")
    report = []
    with tempfile.TemporaryDirectory() as folder:
        for clone, figures in parts:
            for what, part, published, ours, rows in figures(clone, Path(folder)) if clone else ():
                same = abs(published - ours) < 1e-9
                print(
                    f"{what:62} {part:36} {rows:6,} {published:7.2f} {ours:7.2f} {'' if same else 'DIFFERS'}"
                )
                figure = {"what": what, "part": part, "rows": rows, "published": published, "ours": ours}
                report.append(figure | {"same": same})
    wrong = sum(not figure["same"] for figure in report)
    print(f"{len(report) - wrong} of {len(report)} figures are the published code's")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
