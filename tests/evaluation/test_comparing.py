"""`polar-ft eval compare` as a user sees it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from polar_ft.errors import PolarError
from polar_ft.evaluation.commands import eval_app


@pytest.fixture
def run_folder(tmp_path):
    """Writes a run of 40 pairs; `right` says which the run has right."""

    def write(name, right, texts=lambda row: row, subset=lambda row: "chat" if row % 2 else "code"):
        folder = tmp_path / name
        folder.mkdir()
        rows = [
            {
                "id": f"row-{row}",
                "subset": subset(row),
                "chosen_score": 1.0 if right(row) else -1.0,
                "rejected_score": 0.0,
                "input_hash": f"{texts(row):016x}" * 2,
            }
            for row in range(40)
        ]
        (folder / "scores.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return folder

    return write


def invoke(*arguments):
    return CliRunner().invoke(eval_app, [*map(str, arguments)])


def test_the_table_and_the_file(run_folder, tmp_path):
    a = run_folder("a", lambda row: row < 20)
    b = run_folder("b", lambda row: row < 36)
    result = invoke("compare", a, b, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert max(map(len, (line for line in lines if "wrote" not in line))) <= 100
    # 16 of 40 pairs more.
    assert "B − A: +40.0 points" in result.output
    [row] = [line.split() for line in lines if line.startswith("all pairs")]
    assert row[2:6] == ["40", "50.0", "90.0", "+40.0"]
    assert row[-2:] == ["0", "16"]
    compared = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert compared["base"] == str(a)
    [run] = compared["runs"]
    assert run["comparison"]["overall"]["difference"] == pytest.approx(0.4)
    assert set(run["comparison"]["subsets"]["subset"]) == {"chat", "code"}
    assert (run["comparison"]["n_other_texts"], run["comparison"]["matched_by"]) == (0, "texts")


def test_other_texts_under_the_same_ids_are_a_warning(run_folder, tmp_path):
    a = run_folder("a", lambda row: True)
    b = run_folder("b", lambda row: True, texts=lambda row: row + (row < 3) * 100)
    result = invoke("compare", a, b, "--out", tmp_path)
    said = " ".join(result.output.split())
    assert "WARNING: 3 pairs have other texts in B" in said
    assert "on 37 pairs that both have scored" in said
    assert "Left out: 3 pairs that only A has, 3 pairs that only B has." in said


def test_a_file_that_was_sorted_meanwhile_is_the_same_data(run_folder, tmp_path):
    a, b = run_folder("a", lambda row: row < 20), run_folder("b", lambda row: row < 20)
    lines = (b / "scores.jsonl").read_text().splitlines()
    by_place = [json.loads(line) | {"id": f"f:{n}"} for n, line in enumerate(sorted(lines, key=hash), 1)]
    (b / "scores.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in by_place))
    assert invoke("compare", a, b, "--out", tmp_path).exit_code == 0
    [run] = json.loads((tmp_path / "compare.json").read_text())["runs"]
    overall = run["comparison"]["overall"]
    assert (overall["n_pairs"], overall["n_only_a"], overall["n_only_b"]) == (40, 0, 0)


def test_several_runs_against_the_first(run_folder, tmp_path):
    runs = [run_folder(name, lambda row, n=n: row < n) for name, n in (("a", 10), ("b", 20), ("c", 30))]
    assert invoke("compare", *runs, "--out", tmp_path).exit_code == 0
    compared = json.loads((tmp_path / "compare.json").read_text())
    assert [run["comparison"]["overall"]["accuracy_b"] for run in compared["runs"]] == [0.5, 0.75]


def test_hostile_names_are_text(run_folder, tmp_path):
    a = run_folder("a", lambda row: True, subset=lambda row: "[red]x[/red]\x1b[31m")
    b = run_folder("b", lambda row: row > 9)
    result = invoke("compare", a, b, "--out", tmp_path)
    assert "[red]x[/red]" in result.output
    assert "\x1b" not in result.output


def test_errors(run_folder, tmp_path):
    a = run_folder("a", lambda row: True)
    for arguments, message in (((a,), "two runs or more"), ((a, tmp_path / "no"), "no such file")):
        result = invoke("compare", *arguments)
        assert isinstance(result.exception, PolarError)
        assert message in str(result.exception)
