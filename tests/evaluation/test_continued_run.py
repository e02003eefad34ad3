"""A run that was killed goes on with the same command and ends with the same files."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from polar_ft.errors import PolarError
from polar_ft.evaluation import evaluator
from polar_ft.evaluation.cache import ScoreCache
from polar_ft.evaluation.journal import ScoreJournal
from polar_ft.evaluation.references import ReferenceSettings
from polar_ft.evaluation.run import score_into

# Rows by which every kind of line is written: pairs, a ranked row with a tie, several references.
ROWS = [
    {"prompt": f"question {row}", "reference": "r" * row, "chosen": "good" * (row + 1), "rejected": "bad"}
    for row in range(6)
] + [
    {
        "id": "ranked",
        "prompt": "which?",
        "references": ["first", "second"],
        "responses": [{"content": "x" * (4 - score) + "yz", "score": score} for score in (3, 2, 2, 1)],
    }
]

# Kills itself in the middle of scoring, as a scheduler would.
KILLED = """
import os, signal, sys
from pathlib import Path
from tests.evaluation.test_continued_run import run_into
calls = 0
def score(example, candidate):
    global calls
    calls += 1
    if calls > 20:  # the third chunk at the latest
        os.kill(os.getpid(), signal.SIGKILL)
    return len(candidate) / 7 + len(example.reference) / 3
run_into(Path(sys.argv[1]), Path(sys.argv[2]), score)
"""


def length_score(example, candidate):
    return len(candidate) / 7 + len(example.reference) / 3


def run_into(data, folder, score, *, cache=None, setup="setup", references=None, gates=False):
    """Scores a file into a folder in small chunks; gives what was done and the scorer."""
    from polar_ft.data.reading import read_examples
    from polar_ft.template import PolarTemplate
    from tests.evaluation.conftest import FakeScorer, byte_tokenizer

    evaluator.CHUNK_CHARS = 60
    folder.mkdir(exist_ok=True)
    scorer = FakeScorer(
        score, PolarTemplate(byte_tokenizer().to_str(), max_length=400, max_response_length=64)
    )
    done = score_into(
        folder,
        scorer,
        list(read_examples(data)),
        references or ReferenceSettings(shuffle_seed=1, empty=True),
        setup=setup,
        cache=cache,
        gates=gates,
        console=Console(file=io.StringIO()),
    )
    return done, scorer


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(evaluator, "CHUNK_CHARS", 60)


@pytest.fixture
def data(write_rows):
    return write_rows(ROWS)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def scored_rows(scorer):
    return {example.source for call in scorer.calls for example in call}


def test_killed_and_continued_ends_with_the_same_files(data, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_into(data, whole, length_score)
    root = Path(__file__).parents[2]
    process = subprocess.run([sys.executable, "-c", KILLED, data, killed], cwd=root, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    before = (killed / "scores.jsonl").read_bytes()
    kept = {json.loads(line)["source"] for line in before.splitlines()}
    assert 0 < len(kept) < len(ROWS)
    done, scorer = run_into(data, killed, length_score)
    assert contents(killed) == contents(whole)
    # Nothing that was on disk is scored again.
    assert scored_rows(scorer) & kept == set()
    assert done.n_pairs_scored == 6 + 2 - before.count(b"\n")


@pytest.mark.parametrize("torn", [1, 40, 2000])
def test_a_torn_line_is_dropped(data, tmp_path, torn):
    folder = tmp_path / "out"
    run_into(data, folder, length_score)
    whole = contents(folder)
    (folder / "scores.jsonl").write_bytes(whole["scores.jsonl"][:-torn])
    _, scorer = run_into(data, folder, length_score)
    assert contents(folder) == whole
    # The ranked row is the last of the file; of it one line or both are gone, and perhaps rows before it.
    assert scored_rows(scorer) >= {f"{data}:7"}
    assert len(scored_rows(scorer)) < len(ROWS)


def test_a_ranked_row_without_its_line_of_rankings_is_scored_again(data, tmp_path):
    run_into(data, tmp_path / "out", length_score)
    whole = contents(tmp_path / "out")
    (tmp_path / "out" / "rankings.jsonl").write_bytes(b"")
    _, scorer = run_into(data, tmp_path / "out", length_score)
    assert contents(tmp_path / "out") == whole
    assert scored_rows(scorer) == {f"{data}:7"}


def test_a_finished_run_scores_nothing(data, tmp_path):
    run_into(data, tmp_path / "out", length_score)
    done, scorer = run_into(data, tmp_path / "out", length_score)
    assert (scorer.calls, done.n_pairs_scored, done.n_computed) == ([], 0, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"setup": "another model"},
        {"references": ReferenceSettings(shuffle_seed=2, empty=True)},
        {"references": ReferenceSettings(shuffle_seed=1)},
        {"references": ReferenceSettings("max", shuffle_seed=1, empty=True)},
    ],
)
def test_another_run_takes_nothing_over(data, tmp_path, changes):
    run_into(data, tmp_path / "out", length_score)
    done, _ = run_into(data, tmp_path / "out", length_score, **changes)
    # Another seed of seven rows may leave some row its shuffled reference.
    assert done.n_pairs_scored == 8 or ("references" in changes and done.n_pairs_scored > 0)
    run_into(data, tmp_path / "new", length_score, **changes)
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


def test_rows_that_changed_are_scored_again(data, tmp_path, write_rows):
    run_into(data, tmp_path / "out", length_score, references=ReferenceSettings())
    changed = [dict(row) for row in ROWS]
    changed[2]["chosen"] = "better"
    changed[4]["subset"] = "new"
    write_rows(changed)
    _, scorer = run_into(data, tmp_path / "out", length_score, references=ReferenceSettings())
    assert scored_rows(scorer) == {f"{data}:3", f"{data}:5"}
    lines = (tmp_path / "out" / "scores.jsonl").read_text().splitlines()
    assert [json.loads(line)["source"] for line in lines] == [f"{data}:{n}" for n in (1, 2, 3, 4, 5, 6, 7, 7)]


def test_two_runs_do_not_write_one_folder(tmp_path, make_example):
    examples, keys = [make_example(0)], ["k"]
    with ScoreJournal(tmp_path, examples, keys), pytest.raises(PolarError, match="another run is writing it"):
        ScoreJournal(tmp_path, examples, keys)
    with ScoreJournal(tmp_path, examples, keys):  # and afterwards they may
        pass


def test_the_cache_spares_a_second_folder_everything(data, tmp_path):
    with ScoreCache(tmp_path / "cache") as cache:
        first, _ = run_into(data, tmp_path / "one", length_score, cache=cache, gates=True)
        second, scorer = run_into(data, tmp_path / "two", length_score, cache=cache, gates=True)
    assert scorer.calls == []
    assert (second.n_computed, second.n_from_cache) == (0, first.n_computed + first.n_from_cache)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert second.gates == first.gates != []


def test_scores_against_several_references(data, tmp_path):
    """References of 5 and 6 characters: a candidate of n characters gets n/7 + 5/3 and n/7 + 6/3."""
    found = {}
    for aggregation in ("mean", "max", "min"):
        run_into(data, tmp_path / aggregation, length_score, references=ReferenceSettings(aggregation))
        row = json.loads((tmp_path / aggregation / "rankings.jsonl").read_text())
        found[aggregation] = [candidate["score"] for candidate in row["candidates"]]
        pair = json.loads((tmp_path / aggregation / "scores.jsonl").read_text().splitlines()[-1])
        assert [scores["chosen_score"] for scores in pair["reference_scores"]] == pytest.approx(
            [4 / 7 + 5 / 3, 4 / 7 + 2]
        )
    lengths = [3, 4, 4, 5]
    assert found["min"] == pytest.approx([n / 7 + 5 / 3 for n in lengths])
    assert found["max"] == pytest.approx([n / 7 + 6 / 3 for n in lengths])
    assert found["mean"] == pytest.approx([n / 7 + 5.5 / 3 for n in lengths])
