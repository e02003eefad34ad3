"""The command as a user runs it, with a function in place of the model."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import shutil
import sys
import time
from pathlib import Path

import pytest

from polar_ft.evaluation import evaluate, evaluator
from polar_ft.evaluation.report import writing
from polar_ft.template import PolarTemplate

TOOL = Path(__file__).parents[2] / "tools" / "eval_preference.py"

COLOURS = ["red", "blue", "green", "white", "black", "yellow"]


def shares_words(example, candidate):
    """Rewards the words that a candidate shares with the reference: a model that reads it."""
    return float(len(set(candidate.split()) & set(example.reference.split())))


def catalogue(n=60):
    """The reference's colour is right; only the reference says which one it is."""
    return [
        {
            "id": f"item-{row}",
            "subset": "lamps" if row % 3 else "chairs",
            "prompt": f"Which colour has item {row}?",
            "reference": f"{COLOURS[row % 6]}",
            "chosen": f"it comes in {COLOURS[row % 6]}",
            "rejected": f"it comes in {COLOURS[(row + 1 + row // 6 % 5) % 6]}",
            "turns": row,
        }
        for row in range(n)
    ]


@pytest.fixture
def run_tool(monkeypatch, tmp_path, model_dir, make_scorer, capsys):
    """Runs tools/eval_preference.py in this process; gives (exit status, stdout, stderr, settings)."""

    def run(*arguments, score=shares_words):
        settings = {}

        def load(folder, **given):
            settings.update(given)
            scorer = make_scorer(score)
            limits = {key: given[key] for key in ("max_length", "max_response_length") if key in given}
            if limits:
                scorer.template = PolarTemplate.from_pretrained(folder, **limits)
            return scorer

        monkeypatch.setattr(evaluate, "load_scorer", load)
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(TOOL), run_name="__main__")
        captured = capsys.readouterr()
        return exit.value.code or 0, captured.out, captured.err, settings

    return run


def test_a_run_from_data_to_files(run_tool, model_dir, write_rows, tmp_path):
    data = write_rows(catalogue())
    status, out, err, settings = run_tool(model_dir, data, "--shuffle-references", "1")
    assert status == 0, err
    assert settings == {"device": None, "dtype": "auto", "allow_tokenizer_code": ()}
    [folder] = (tmp_path / "work_dirs" / "eval").iterdir()
    assert folder.name.startswith("polar-tiny-held_out-")
    report = json.loads((folder / "metrics.json").read_text())
    overall = report["metrics"]["overall"]
    assert (overall["n_pairs"], overall["accuracy"], overall["n_ties"]) == (60, 1.0, 0)
    # Wilson for n of n: the lower bound is n / (n + z²).
    assert overall["accuracy_ci95"] == pytest.approx([60 / (60 + 1.959963984540054**2), 1.0])
    assert report["metrics"]["subsets"]["subset"]["subsets"].keys() == {"chairs", "lamps"}
    # No row keeps its colour, so no chosen answer is rewarded.
    assert report["run"]["n_same_reference"] == 0
    assert report["metrics"]["reference_use"]["shuffled"]["overall"]["accuracy"] == 0.0
    assert report["run"]["data"][0]["path"] == str(data)
    assert len(report["run"]["data"][0]["sha256"]) == 64
    assert (report["run"]["max_length"], report["run"]["n_rows"]) == (400, 60)

    rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"item-{row}" for row in range(60)]
    first = rows[0]
    assert (first["chosen_score"], first["rejected_score"], first["margin"]) == (1.0, 0.0, 1.0)
    assert (first["chosen_chars"], first["chosen_tokens"]) == (15, 16)
    assert first["source"] == f"{data}:1"
    assert first["extra"] == {"turns": 0}
    assert first["cut"] == {"prompt": 0, "reference": 0, "chosen": 0, "rejected": 0}

    assert "accuracy 100.0 %, 95 % interval 94.0–100.0, on 60 held-out pairs" in out
    assert "scores.jsonl" in out
    assert (
        max(len(line) for line in out.splitlines() if "wrote" not in line and str(tmp_path) not in line)
        <= 100
    )
    # Progress goes to stderr, in lines where stderr is no terminal.
    assert "scoring: 60/60 pairs, " in err
    assert "pairs/s, took 0:00:0" in err


def test_several_files_are_subsets_of_their_own(run_tool, model_dir, write_rows, tmp_path):
    rows = [{key: value for key, value in row.items() if key != "subset"} for row in catalogue(12)]
    one, other = write_rows(rows[:8], "one.jsonl"), write_rows(rows[8:], "other.jsonl")
    status, _, err, _ = run_tool(model_dir, one, other, "--out", tmp_path / "results")
    assert status == 0, err
    report = json.loads((tmp_path / "results" / "metrics.json").read_text())
    subsets = report["metrics"]["subsets"]["subset"]["subsets"]
    assert {name: figures["n_pairs"] for name, figures in subsets.items()} == {str(one): 8, str(other): 4}
    assert report["metrics"]["reference_use"]["shuffled"] is None


def test_ranked_rows_and_ties_in_the_data(run_tool, model_dir, write_rows, tmp_path):
    def ranked(scores):
        responses = [{"content": f"answer {i}", "score": score} for i, score in enumerate(scores)]
        return {"prompt": "?", "reference": "answer", "responses": responses}

    data = write_rows([ranked([3, 2, 1]), ranked([2, 2, 1]), ranked([1, 1])])

    def score(example, text):
        return -float(text[-1]) if text[-1].isdigit() else 0.0

    status, out, err, _ = run_tool(model_dir, data, "--pairing", "all", "--out", "results", score=score)
    assert status == 0, err
    report = json.loads((tmp_path / "results" / "metrics.json").read_text())
    # Three pairs of the first row, two of the second; a tie in the second and one in the third.
    assert (report["metrics"]["overall"]["n_pairs"], report["metrics"]["overall"]["accuracy"]) == (5, 1.0)
    assert (report["run"]["n_rows"], report["run"]["n_ties_in_data"]) == (3, 2)
    assert "2 pairs that the data ranks the same" in " ".join(out.split())


def test_what_was_cut_is_shown(run_tool, model_dir, write_rows, tmp_path):
    rows = catalogue(4)
    rows[0]["chosen"] = "red " * 50
    options = ("--max-length", 400, "--max-response-length", 64, "--batch-tokens", 512, "--dtype", "float32")
    status, out, err, settings = run_tool(model_dir, write_rows(rows), *options)
    assert status == 0, err
    assert settings["tokens_per_batch"] == 512
    assert settings["dtype"] == "float32"
    assert "1 of 4 pairs were cut" in " ".join(out.split())
    assert "(prompt 0, reference 0, chosen 1, rejected 0)" in " ".join(out.split())
    [scores] = tmp_path.glob("work_dirs/eval/*/scores.jsonl")
    first = scores.read_text().splitlines()[0]
    # 200 bytes and <s>, of which 64 are kept.
    assert json.loads(first)["chosen_tokens"] == 201
    assert json.loads(first)["cut"]["chosen"] == 201 - 64


def test_some_scores_that_are_not_finite_are_a_warning(run_tool, model_dir, write_rows):
    def score(example, candidate):
        return math.nan if example.id == "item-3" else shares_words(example, candidate)

    status, out, _, _ = run_tool(model_dir, write_rows(catalogue(6)), score=score)
    assert status == 0
    assert "1 of 6 pairs have a score that is NaN or infinite" in " ".join(out.split())


def test_no_finite_score_at_all_is_an_error_with_files(run_tool, model_dir, write_rows, tmp_path):
    status, _, err, _ = run_tool(
        model_dir, write_rows(catalogue(6)), "--out", "results", score=lambda *_: math.nan
    )
    assert status == 1
    assert "not one of 6 pairs has finite scores" in " ".join(err.split())
    assert "--dtype float32" in err
    assert (
        json.loads((tmp_path / "results/metrics.json").read_text())["metrics"]["overall"]["accuracy"] is None
    )


def test_bad_rows_are_named_and_nothing_is_scored(run_tool, model_dir, write_rows, tmp_path):
    rows = catalogue(5)
    del rows[2]["chosen"]
    data = write_rows(rows)
    status, _, err, settings = run_tool(model_dir, data)
    assert status == 1
    assert f"{data}:3: chosen: is missing" in err
    assert settings == {}
    assert not list(tmp_path.rglob("metrics.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no/such/model/folder", "DATA"), "no/such/model/folder: no such folder"),
        (("MODEL", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
        (("MODEL", "DATA", "--out", "DATA"), "cannot be written to"),
        (("MODEL", "EMPTY"), "has no rows"),
        (("MODEL", "TIES"), "every ranked row has nothing but ties"),
        (("MODEL", "LONG"), ":1: a reference of 64 tokens leaves the prompt a budget of 0"),
    ],
)
def test_errors_name_what_to_do(run_tool, model_dir, write_rows, arguments, message):
    tied = {"prompt": "?", "reference": "", "responses": [{"content": c, "rank": 1} for c in "ab"]}
    paths = {
        "MODEL": model_dir,
        "DATA": write_rows(catalogue(3)),
        "EMPTY": write_rows([], "empty.jsonl"),
        "TIES": write_rows([tied], "ties.jsonl"),
        "LONG": write_rows([{**catalogue(1)[0], "reference": "r" * 99}], "long.jsonl"),
    }
    limits = ("--max-length", 132, "--max-response-length", 64)
    status, _, err, _ = run_tool(*(paths.get(argument, argument) for argument in arguments), *limits)
    assert status == 1
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_wrong_options_are_refused(run_tool, model_dir, write_rows):
    status, _, err, _ = run_tool(model_dir, write_rows(catalogue(3)), "--dtype", "float8")
    assert status == 2
    assert "float8" in err


@pytest.fixture
def no_plots(monkeypatch):
    """Plots take most of the time of a small run."""
    monkeypatch.setattr(writing, "make_plots", lambda *_: [])


@pytest.mark.usefixtures("no_plots")
def test_other_data_and_another_model_of_the_same_name_have_folders_of_their_own(
    run_tool, model_dir, write_rows, tmp_path
):
    ten, four = write_rows(catalogue(10)), write_rows(catalogue(4), "other/held_out.jsonl")
    other = tmp_path / "elsewhere" / model_dir.name
    shutil.copytree(model_dir, other)
    for folder, weights in ((model_dir, b"one"), (other, b"two")):
        (folder / "model.safetensors").write_bytes(weights)
    for arguments in (
        (model_dir, ten),
        (model_dir, four),
        (other, ten),
        (model_dir, ten, "--pairing", "all"),
    ):
        status, _, err, _ = run_tool(*arguments)
        assert status == 0, err
    folders = sorted((tmp_path / "work_dirs/eval").iterdir())
    assert len(folders) == 4
    assert {folder.name[: len("polar-tiny-held_out-")] for folder in folders} == {"polar-tiny-held_out-"}
    held = [json.loads((folder / "evaluation.json").read_text()) for folder in folders]
    assert (
        sorted(len((folder / "scores.jsonl").read_text().splitlines()) for folder in folders)
        == [4] + [10] * 3
    )
    assert {entry["data"][0]["path"] for entry in held} == {str(ten), str(four)}
    assert {entry["model"] for entry in held} == {str(model_dir), str(other)}


@pytest.mark.usefixtures("no_plots")
def test_a_folder_holds_one_evaluation(run_tool, model_dir, write_rows, tmp_path):
    ten, four = write_rows(catalogue(10)), write_rows(catalogue(4), "four.jsonl")
    folder = tmp_path / "out"
    assert run_tool(model_dir, ten, "--out", "out")[0] == 0
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    status, _, err, settings = run_tool(model_dir, four, "--out", "out", "--pairing", "all")
    said = " ".join(err.split())
    assert (status, settings) == (1, {})
    assert "out: holds the results of another evaluation (data: " in said
    assert f"{ten.name} (" in said
    assert f"{four} (" in said
    assert "pairing: adjacent, now all" in said
    assert "--force" in said
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before
    # Of scores that are read as well.
    status, _, err, _ = run_tool("--from-scores", folder / "scores.jsonl", "--out", "out")
    assert (status, "is the folder of the scores" in err) == (1, True)

    assert run_tool(model_dir, four, "--out", "out", "--force")[0] == 0
    assert len((folder / "scores.jsonl").read_text().splitlines()) == 4
    assert json.loads((folder / "metrics.json").read_text())["metrics"]["overall"]["n_pairs"] == 4
    assert sorted(os.listdir(folder)) == sorted(
        ["evaluation.json", "metrics.json", "plots", "report.html", "report.md", "scores.jsonl"]
    )


def test_results_of_an_unknown_evaluation_are_not_replaced(run_tool, model_dir, write_rows, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.json").write_text("{}")
    status, _, err, _ = run_tool(model_dir, write_rows(catalogue(4)), "--out", "out")
    assert status == 1
    assert "holds results that do not say which evaluation they are of" in " ".join(err.split())


def never(*_):
    pytest.fail("scored again")


@pytest.mark.usefixtures("no_plots")
def test_a_finished_evaluation_is_shown_at_once(run_tool, model_dir, write_rows, tmp_path):
    (model_dir / "model.safetensors").write_bytes(b"weights")
    data = write_rows(catalogue(12))
    status, first, _, _ = run_tool(model_dir, data)
    [folder] = (tmp_path / "work_dirs/eval").iterdir()
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    status, again, err, settings = run_tool(model_dir, data, score=never)
    assert (status, settings) == (0, {}), err  # the model is not loaded
    assert again == first.replace("wrote ", "up to date: ")
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before
    # Other figures of the same scores: in the same folder, without scoring.
    status, by_turns, _, settings = run_tool(model_dir, data, "--subset-by", "turns", score=never)
    assert (status, "turns" in by_turns, settings != {}) == (0, True, True)
    assert len(list((tmp_path / "work_dirs/eval").iterdir())) == 1
    # What was changed by hand, or is asked for anew, is written anew.
    scores = folder / "scores.jsonl"
    for options, damage in (((), True), (("--no-cache",), False)):
        complete = scores.read_bytes()
        if damage:
            scores.write_bytes(complete[:-40])
        status, _, _, settings = run_tool(model_dir, data, *options)
        assert (status, settings != {}, scores.read_bytes()) == (0, True, complete)
    # A changed row or model is another evaluation.
    (model_dir / "tokenizer_config.json").write_text("{}")
    run_tool(model_dir, data)
    write_rows(catalogue(11))
    run_tool(model_dir, data)
    assert len(list((tmp_path / "work_dirs/eval").iterdir())) == 3


@pytest.mark.usefixtures("no_plots")
def test_ctrl_c_says_what_is_kept_and_the_same_command_resumes(
    run_tool, model_dir, write_rows, tmp_path, monkeypatch
):
    (model_dir / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(evaluator, "CHUNK_CHARS", 400)
    data = write_rows(catalogue(40))
    scored = []

    def interrupted(example, candidate):
        scored.append(candidate)
        time.sleep(0.01)
        if len(scored) == 41:
            raise KeyboardInterrupt
        return shares_words(example, candidate)

    status, _, err, _ = run_tool(model_dir, data, "--out", "out", score=interrupted)
    [line] = [line for line in err.splitlines() if "interrupted" in line]
    assert status == 130
    kept = re.fullmatch(
        r"interrupted: (\d+) rewards of this run are kept in (.*); the same command resumes", line
    )
    assert 0 < int(kept[1]) <= 40
    assert Path(kept[2]).is_file()
    assert not (tmp_path / "out" / "metrics.json").exists()
    first_part = json.loads((tmp_path / "out/evaluation.json").read_text())["seconds"]
    assert first_part >= 0.01 * int(kept[1])

    status, _, err, _ = run_tool(model_dir, data, "--out", "out")
    assert status == 0, err
    run = json.loads((tmp_path / "out/metrics.json").read_text())["run"]
    assert run["n_from_cache"] >= int(kept[1])
    assert run["seconds"] > first_part  # of both parts
    assert run["pairs_per_second"] == pytest.approx(40 / run["seconds"], rel=1e-2)


def test_a_training_folder_is_called_one(run_tool, write_rows, tmp_path):
    work_dir = tmp_path / "work"
    work_dir.mkdir()
    for name in ("polar_tiny.py", "iter_10.pth", "best_accuracy_iter_5.pth"):
        (work_dir / name).write_bytes(b"")
    status, _, err, _ = run_tool(work_dir, write_rows(catalogue(3)))
    said = " ".join(err.split())
    assert status == 1
    assert "work: is the folder of a training run" in said
    assert f"polar-ft convert {work_dir}/polar_tiny.py {work_dir}/best_accuracy_iter_5.pth HF_DIR" in said


def test_figures_by_any_field(run_tool, model_dir, write_rows, tmp_path):
    rows = [{**row, "meta": {"language": "en" if n % 2 else "zh"}} for n, row in enumerate(catalogue(8))]
    options = (
        "--subset-by",
        "meta.language",
        "--subset-by",
        "turns",
        "--out",
        "results",
        "--empty-references",
    )
    status, out, err, _ = run_tool(model_dir, write_rows(rows), *options)
    assert status == 0, err
    metrics = json.loads((tmp_path / "results/metrics.json").read_text())["metrics"]
    assert list(metrics["subsets"]) == ["subset", "meta.language", "turns"]
    assert list(metrics["subsets"]["meta.language"]["subsets"]) == ["en", "zh"]
    # Without a reference nothing is shared with it: all ties.
    assert metrics["reference_use"]["empty"]["overall"]["n_ties"] == 8
    assert "meta.language" in out


def test_saved_scores_give_the_same_figures(run_tool, model_dir, write_rows, tmp_path):
    run_tool(model_dir, write_rows(catalogue(12)), "--out", "run")
    status, out, err, settings = run_tool("--from-scores", "run", "--out", "again")
    assert status == 0, err
    assert settings == {}, "no model is loaded"
    first, again = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("run", "again"))
    assert again["metrics"] == first["metrics"]
    assert again["truncation"] == first["truncation"]
    assert again["run"]["model"] is None
    assert (tmp_path / "again" / "report.html").is_file()
    assert "accuracy 100.0 %" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--from-scores", "SCORES"), "--from-scores needs --out DIR"),
        (("--from-scores", "SCORES", "--out", "o", "MODEL"), "leave HF_DIR and DATA out"),
        (("--from-scores", "nowhere", "--out", "o"), "nowhere: no such file"),
        (("MODEL",), "name a model folder and held-out data"),
    ],
)
def test_what_goes_together(run_tool, model_dir, tmp_path, arguments, message):
    scores = tmp_path / "scores.csv"
    scores.write_text("chosen_score,rejected_score\n1,0\n")
    paths = {"MODEL": model_dir, "SCORES": scores}
    status, _, err, _ = run_tool(*(paths.get(argument, argument) for argument in arguments))
    assert status == 1
    assert message in " ".join(err.split())
    assert not (tmp_path / "o").exists()


def test_a_second_evaluation_scores_nothing(run_tool, model_dir, write_rows, tmp_path, monkeypatch):
    (model_dir / "model.safetensors").write_bytes(b"weights")
    data = write_rows(catalogue(6))
    assert run_tool(model_dir, data, "--out", "one")[0] == 0
    again = run_tool(model_dir, data, "--out", "two", score=lambda *_: pytest.fail("scored again"))
    assert again[0] == 0, again[2]
    one, two = (tmp_path / name for name in ("one", "two"))
    assert (one / "scores.jsonl").read_bytes() == (two / "scores.jsonl").read_bytes()
    report = json.loads((two / "metrics.json").read_text())
    assert (report["run"]["n_from_cache"], len(report["run"]["model_sha256"])) == (12, 64)
    # Other weights are another model.
    (model_dir / "model.safetensors").write_bytes(b"other weights")
    assert run_tool(model_dir, data, "--out", "three")[0] == 0
    assert json.loads((tmp_path / "three/metrics.json").read_text())["run"]["n_from_cache"] == 0


def test_a_gate_that_fails_ends_with_status_1_and_files(run_tool, model_dir, write_rows, tmp_path):
    def prefers_what_comes_first(example, candidate):
        return -float(example.candidates.index(candidate))

    data = write_rows(catalogue(6))
    status, _, err, _ = run_tool(model_dir, data, "--out", "results", score=prefers_what_comes_first)
    assert status == 1
    assert "the scores failed a check of their own" in " ".join(err.split())
    gates = json.loads((tmp_path / "results/metrics.json").read_text())["gates"]
    assert {gate["name"]: gate["status"] for gate in gates}["label_swap"] == "failed"
    options = ("--no-gates", "--out", "unchecked")
    assert run_tool(model_dir, data, *options, score=prefers_what_comes_first)[0] == 0
    assert json.loads((tmp_path / "unchecked/metrics.json").read_text())["gates"] == []
