"""benchmarks/published_figures.py on clones with a few rows that are laid out as the real ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.published_figures import main
from tests.data.converters.published import published

CODE, MATH = "livecodebench", "livebench-math"
PAIRS = "dataset=judgebench,response_model=gpt-4o"


def judged(label: str, source: str, scores: list[float], pair_id: str) -> dict[str, Any]:
    """A row of outputs/: both orders of the answers, a tie decided for the second one."""
    orders = [
        {"judgment": {"scores": given}, "decision": "A>B" if given[0] > given[1] else "B>A"}
        for given in (scores, scores[::-1])
    ]
    return published("judgebench", label=label, source=source, pair_id=pair_id) | {"judgments": orders}


def write_judgebench(clone: Path, rows: list[dict[str, Any]]) -> None:
    for name, lines in {
        f"data/{PAIRS}.jsonl": [{key: row[key] for key in row if key != "judgments"} for row in rows],
        f"outputs/{PAIRS},judge_name=reward_model,judge_model=small.jsonl": rows,
    }.items():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_figures_of_both_ways_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        judged("A>B", CODE, [2.0, 1.0], "1"),
        judged("B>A", CODE, [1.0, 1.0], "2"),  # a tie: right in one order only, which does not count
        judged("A>B", MATH, [0.0, 1.0], "3"),
        judged("A>B", "livebench-reasoning", [2.0, 1.0], "4"),
        judged("A>B", "mmlu-pro-law", [2.0, 1.0], "5"),
    ]
    write_judgebench(tmp_path / "judgebench", rows)
    folder = tmp_path / "rmb" / "RMB_dataset" / "BoN_set" / "Harmlessness"
    folder.mkdir(parents=True)
    answers = [{"llm_name": "m", "answer": text} for text in ("longest", "long", "l")]
    row = published("rmb-bon", bon_best=answers[0], loser_list=answers[1:])
    (folder / "S1.json").write_text(json.dumps([row, row | {"bon_best": answers[2]}]))
    arguments = ["", "--judgebench", str(tmp_path / "judgebench"), "--rmb", str(tmp_path / "rmb")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--json", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    report = {(row["what"], row["part"]): row for row in json.loads((tmp_path / "out.json").read_text())}
    figures = {part: report["JudgeBench, small", part]["ours"] for part in ("Coding", "Math", "Overall")}
    assert figures == {"Coding": 50.0, "Math": 0.0, "Overall": pytest.approx(60.0)}
    assert report["RMB best of N, length of the answer", "Harmlessness/S1"]["ours"] == 50.0
    assert "9 of 9 figures are the published code's" in capsys.readouterr().out

    rows[0]["judgments"] = rows[2]["judgments"]  # the record no longer says what its scores say
    for judgment in rows[0]["judgments"]:
        judgment["decision"] = "A>B"
    rows[0]["judgments"][1]["decision"] = "B>A"
    write_judgebench(tmp_path / "judgebench", rows)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "DIFFERS" in capsys.readouterr().out
