"""A run that was killed resumes with the same command and ends with the same files."""

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
from polar_ft.evaluation import evaluator, run
from polar_ft.evaluation.cache import CACHE_FILE, ScoreCache
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
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_killed_and_continued_ends_with_the_same_files(data, tmp_path):
    complete, killed = tmp_path / "complete", tmp_path / "killed"
    run_into(data, complete, length_score)
    root = Path(__file__).parents[2]
    process = subprocess.run([sys.executable, "-c", KILLED, data, killed], cwd=root, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert not (killed / "scores.jsonl").exists()
    assert (killed / ".unfinished-scores" / CACHE_FILE).exists()
    done, scorer = run_into(data, killed, length_score)
    assert contents(killed) == contents(complete)
    # 20 rewards were computed before the kill; those of the chunks that had ended are not computed again.
    assert 0 < done.n_from_cache <= 20
    asked = [(example.key, text) for call in scorer.calls for example in call for text in example.candidates]
    assert len(asked) == len(set(asked)) == done.n_computed
    assert done.n_pairs_scored < 8


def test_an_interrupted_run_leaves_the_earlier_result(data, tmp_path):
    folder = tmp_path / "out"
    run_into(data, folder, length_score)
    (folder / "report.md").write_text("figures")
    before = contents(folder)

    def fails(example, candidate):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        run_into(data, folder, fails, setup="another model")
    left = contents(folder)
    assert {name: left[name] for name in before} == before


def test_a_full_disk_under_the_cache_is_an_error_that_names_it(tmp_path):
    with ScoreCache(tmp_path / "cache") as cache:
        cache._db.execute("PRAGMA max_page_count = 1")  # SQLite's "database or disk is full"
        with pytest.raises(
            PolarError, match=r"cache/scores\.sqlite: .*disk is full.*folder with --cache-dir"
        ):
            cache.put("setup", {number.to_bytes(16, "big"): 1.0 for number in range(3000)})


def test_a_full_disk_under_the_results_leaves_the_earlier_ones(data, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    run_into(data, folder, length_score)
    (folder / "metrics.json").write_text("figures")
    before = contents(folder)

    def full(row):
        raise OSError(28, "No space left on device")

    problem = r"written \(No space left on device\); make room or name another folder with --out"
    with ScoreCache(tmp_path / "cache") as cache:
        with monkeypatch.context() as patch:
            patch.setattr(run, "to_json_line", full)
            with pytest.raises(PolarError, match=problem):
                run_into(data, folder, length_score, cache=cache, setup="another model")
        assert contents(folder) == before
        _, scorer = run_into(data, folder, length_score, cache=cache, setup="another model")
    assert scorer.calls == []
    assert sorted(contents(folder)) == ["rankings.jsonl", "scores.jsonl"]


def test_a_finished_run_scores_nothing(data, tmp_path):
    with ScoreCache(tmp_path / "cache") as cache:
        run_into(data, tmp_path / "out", length_score, cache=cache)
        done, scorer = run_into(data, tmp_path / "out", length_score, cache=cache)
    # No time and no rate either: nothing was scored.
    assert (scorer.calls, done.n_pairs_scored, done.n_computed, done.seconds) == ([], 0, 0, 0.0)


@pytest.mark.parametrize("torn", [1, 40, 2000])
@pytest.mark.parametrize("name", ["scores.jsonl", "rankings.jsonl"])
def test_a_damaged_file_is_written_again(data, tmp_path, name, torn):
    folder = tmp_path / "out"
    with ScoreCache(tmp_path / "cache") as cache:
        run_into(data, folder, length_score, cache=cache)
        complete = contents(folder)
        (folder / name).write_bytes(complete[name][:-torn])
        _, scorer = run_into(data, folder, length_score, cache=cache)
    assert contents(folder) == complete
    assert scorer.calls == []


def test_a_run_without_a_cache_leaves_a_cache_in_its_folder_alone(data, tmp_path):
    folder = tmp_path / "out"
    with ScoreCache(folder) as cache:
        first, _ = run_into(data, folder, length_score, cache=cache)
    second, _ = run_into(data, folder, length_score)
    assert second.n_computed == first.n_computed > 0
    assert sorted(contents(folder)) == ["rankings.jsonl", "scores.jsonl", CACHE_FILE]


def test_without_a_cache_everything_is_scored_again(data, tmp_path):
    first, _ = run_into(data, tmp_path / "out", length_score)
    second, _ = run_into(data, tmp_path / "out", length_score)
    assert second.n_computed == first.n_computed > 0
    assert sorted(contents(tmp_path / "out")) == ["rankings.jsonl", "scores.jsonl"]


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
    with ScoreCache(tmp_path / "cache") as cache:
        run_into(data, tmp_path / "out", length_score, cache=cache)
        done, _ = run_into(data, tmp_path / "out", length_score, cache=cache, **changes)
    if "setup" in changes:
        assert (done.n_pairs_scored, done.n_from_cache) == (8, 0)
    run_into(data, tmp_path / "new", length_score, **changes)
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


def test_rows_that_changed_are_scored_again(data, tmp_path, write_rows):
    changed = [dict(row) for row in ROWS]
    changed[2]["chosen"] = "better"
    changed[4]["subset"] = "new"  # is written, and decides no reward
    with ScoreCache(tmp_path / "cache") as cache:
        run_into(data, tmp_path / "out", length_score, cache=cache, references=ReferenceSettings())
        write_rows(changed)
        _, scorer = run_into(
            data, tmp_path / "out", length_score, cache=cache, references=ReferenceSettings()
        )
    assert [example.candidates for call in scorer.calls for example in call] == [("better",)]
    rows = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    assert [row["source"] for row in rows] == [f"{data}:{n}" for n in (1, 2, 3, 4, 5, 6, 7, 7)]
    assert rows[4]["subset"] == "new"


def test_two_runs_do_not_write_one_folder(data, tmp_path):
    def second_run(example, candidate):
        run_into(data, tmp_path / "out", length_score)

    with pytest.raises(PolarError, match="another run is writing into it"):
        run_into(data, tmp_path / "out", second_run)
    run_into(data, tmp_path / "out", length_score)  # and afterwards they may


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
