from __future__ import annotations

import datetime
import io
import json
import math
import re

import pytest
from rich.console import Console

from polar_ft.errors import PolarError
from polar_ft.evaluation.evaluator import FieldTokens
from polar_ft.evaluation.report import NO_SUBSET, RunInfo, build_report, write_report
from polar_ft.evaluation.scores import ScoredPair, scored_pairs
from polar_ft.evaluation.table import TABLE_WIDTH, metrics_table, notes
from polar_ft.template import Cut, Lengths


def field_tokens(cut=(0, 0, 0, 0)):
    return FieldTokens(Lengths(30, 20, (10, 5)), Cut(cut[0], cut[1], cut[2:]))


def run_info(**fields):
    values = {
        "model": "work_dirs/polar-tiny",
        "data": [],
        "created": "2026-01-01T00:00:00+00:00",
        "versions": {},
        "dtype": "float32",
        "device": "cpu",
        "max_length": 400,
        "max_response_length": 64,
        "template_fingerprint": "0" * 16,
        "pairing": "adjacent",
        "n_rows": 4,
        "n_ties_in_data": 0,
        "shuffle_seed": None,
        "seconds": 1.0,
        "pairs_per_second": 4.0,
    }
    return RunInfo(**{**values, **fields})


@pytest.fixture
def rows(make_example):
    examples = [
        make_example(0, subset="chat", candidates=("longer", "short")),
        make_example(1, subset="chat", candidates=("same", "size"), extra={"turns": 2}),
        make_example(2, candidates=("tiny", "enormous")),
        make_example(3, subset="code", candidates=("a", "b")),
    ]
    scores = [[2.0, 1.0], [0.5, 0.5], [0.0, 3.0], [math.nan, 1.0]]
    shuffled = [[1.0, 2.0], [1.0, 0.0], [0.0, 3.0], [0.0, 1.0]]
    tokens = [field_tokens(), field_tokens((3, 0, 0, 1)), field_tokens((1, 2, 3, 0)), field_tokens()]
    return list(
        scored_pairs(examples, scores, tokens, shuffled_scores=shuffled, reference_sources=[1, 0, 3, 2])
    )


def test_report_by_hand(rows):
    report = build_report(rows, run_info(shuffle_seed=0))
    metrics = report.metrics
    assert (metrics.overall.n_pairs, metrics.overall.n_scored, metrics.overall.n_ties) == (4, 3, 1)
    assert metrics.overall.accuracy == 1 / 3
    assert {name: figures.accuracy for name, figures in metrics.subsets.items()} == {
        NO_SUBSET: 0.0,
        "chat": 0.5,
        "code": None,
    }
    assert metrics.macro.accuracy == 0.25
    # Of the three scored pairs the longer one is chosen, equally long, rejected.
    assert report.baselines.longer_wins.overall == 0.5
    assert report.shuffled_reference.metrics.overall.accuracy == 1 / 4
    assert report.shuffled_reference.n_same_reference == 0
    assert report.truncation.model_dump() == {
        "n_pairs": 2,
        "prompt": 2,
        "reference": 1,
        "chosen": 1,
        "rejected": 1,
    }


def test_several_pairs_of_one_ranked_row(make_example):
    example = make_example(
        0,
        candidates=("best", "middle", "worst"),
        pairs=((0, 1), (1, 2)),
        candidate_info=({"policy": "x"}, {"policy": "y"}, {"policy": "z"}),
    )
    tokens = FieldTokens(Lengths(9, 9, (5, 7, 6)), Cut(0, 0, (0, 0, 2)))
    first, second = scored_pairs([example], [[3.0, 1.0, 2.0]], [tokens])
    assert (first.pair, first.margin, first.chosen_tokens, first.rejected_tokens) == ((0, 1), 2.0, 5, 7)
    assert (second.pair, second.margin, second.cut.rejected) == ((1, 2), -1.0, 2)
    assert first.prompt_id == second.prompt_id
    assert (second.chosen_info, second.rejected_info) == ({"policy": "y"}, {"policy": "z"})
    assert first.shuffled_reference is None


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def test_files_are_strict_json_and_read_back(rows, tmp_path):
    report = build_report(rows, run_info(shuffle_seed=0))
    metrics_file, scores_file = write_report(report, rows, tmp_path / "out")
    metrics = json.loads(metrics_file.read_text(), parse_constant=refuse)
    assert metrics["metrics"]["overall"]["accuracy_ci95"] == pytest.approx(
        report.metrics.overall.accuracy_ci95
    )
    lines = scores_file.read_text().splitlines()
    written = [json.loads(line, parse_constant=refuse) for line in lines]
    assert written[1]["extra"] == {"turns": 2}
    assert written[3]["chosen_score"] == "NaN"
    back = [ScoredPair.model_validate_json(line) for line in lines]
    assert back[:3] == rows[:3]
    assert math.isnan(back[3].chosen_score)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.json", "scores.jsonl"]


def test_extra_fields_that_json_cannot_hold(make_example, tmp_path):
    extra = {
        "raw": b"\xff\x00",
        "nan": math.nan,
        "type": int,
        "half": "\ud83d",
        "day": datetime.date(2026, 1, 2),
    }
    rows = list(scored_pairs([make_example(0, extra=extra)], [[1.0, 0.0]], [field_tokens()]))
    _, scores_file = write_report(build_report(rows, run_info()), rows, tmp_path)
    written = json.loads(scores_file.read_text(), parse_constant=refuse)["extra"]
    assert written == {
        "raw": "b'\\xff\\x00'",
        "nan": "NaN",
        "type": "<class 'int'>",
        "half": "\ud83d",
        "day": "2026-01-02",
    }


def test_a_full_disk_leaves_what_was_there(rows, tmp_path):
    report = build_report(rows, run_info())
    write_report(report, rows[:1], tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def disk_full():
        yield rows[0]
        raise OSError(28, "No space left on device")

    with pytest.raises(PolarError, match=r"could not be written \(No space left on device\).*--out"):
        write_report(report, disk_full(), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def render(report):
    console = Console(width=TABLE_WIDTH, file=io.StringIO())
    console.print(metrics_table(report))
    return console.file.getvalue()


def test_table_shows_every_figure(rows):
    text = render(build_report(rows, run_info(shuffle_seed=0)))
    cells = {name.strip(): rest.split() for name, rest in re.findall(r"^(.*?)  +(\S.*)$", text, re.MULTILINE)}
    # pairs, accuracy, interval, ties, not finite, margin, log-loss, longer/shorter, shuffled.
    # chat: margins 1 and 0, so log-loss (log(1 + 1/e) + log 2) / 2 = (0.3133 + 0.6931) / 2
    chat = ["2", "50.0", "9.5–90.5", "1", "0", "0.500", "0.503", "75.0/25.0", "50.0"]
    code = ["1", "–", "–", "0", "1", "–", "–", "–", "0.0"]
    assert cells["chat"] == chat
    assert cells["code"] == code
    assert cells["all pairs"][:2] == ["4", "33.3"]
    assert cells["mean of subsets"][0] == "25.0"


def test_table_fits_100_columns_at_its_widest(make_example):
    names = ["a very long name of a subset that goes on and on", "data/held_out/multilingual.jsonl", "数学题"]
    examples = [make_example(row, subset=names[row % 3]) for row in range(30)]
    scores = [[-12345.678 * row, 98765.4321 * row] for row in range(30)]
    sources = list(range(30))
    tokens = [field_tokens()] * 30
    rows = list(scored_pairs(examples, scores, tokens, shuffled_scores=scores, reference_sources=sources))
    text = render(build_report(rows * 1000, run_info(shuffle_seed=1)))
    assert max(map(len, text.splitlines())) <= TABLE_WIDTH
    assert "…" not in text
    assert all(line.split()[-1] == "0.0" for line in text.splitlines() if "0.0–0.0" in line)
    assert "30000" in text
    assert "shuffled" in text


def test_notes_say_what_the_figures_mean(rows):
    text = "\n".join(notes(build_report(rows, run_info(shuffle_seed=0, n_ties_in_data=7))))
    assert "correct / scored pairs = 1 / 3" in text
    assert "ties as half it is 50.0 %" in text
    assert "WARNING: 1 of 4 pairs have a score that is NaN or infinite" in text
    assert "7 pairs that the data itself ranks the same" in text
    assert "2 of 4 pairs (prompt 2, reference 1, chosen 1, rejected 1)" in text
    assert "References shuffled between rows: accuracy 25.0 %" in text


def test_references_that_could_not_be_shuffled_are_counted(make_example):
    examples = [make_example(row, reference="the same") for row in range(2)]
    rows = list(
        scored_pairs(
            examples,
            [[1.0, 0.0]] * 2,
            [field_tokens()] * 2,
            shuffled_scores=[[1.0, 0.0]] * 2,
            reference_sources=[1, 0],
        )
    )
    report = build_report(rows, run_info(shuffle_seed=0))
    assert report.shuffled_reference.n_same_reference == 2
    assert "2 pairs kept the same reference text" in notes(report)[-1]
