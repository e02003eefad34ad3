"""Agreement, consistency and bias by figures derived by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from polar_ft.cli import app as cli
from polar_ft.data.reading import read_examples
from polar_ft.labelling.decisions import Decision
from polar_ft.labelling.report import krippendorff_alpha, report_on
from tests.labelling.conftest import lines
from tests.labelling.test_store import decide


def vote(labeller: str, pair: str, winner: int | None, left: int = 0, **more) -> Decision:
    choice = "tie" if winner is None else "left" if winner == left else "right"
    return Decision(labeller, pair, winner, left, choice, **more)


def test_alpha_by_hand():
    # Nobody shares a pair: nothing is known. All agree: 1.
    assert krippendorff_alpha([[0], [1]]) is None
    assert krippendorff_alpha([[0, 0], [1, 1, 1]]) == 1
    # Two labellers who disagree on both pairs: o = 4, n = 4, n_0 = n_1 = 2: 1 − 3 · 4 / 8.
    assert krippendorff_alpha([[0, 1], [1, 0]]) == -0.5
    # With a tie, and a pair of three: values 0 0 | 0 tie | 1 1 0. Differing: 2 / 1 of the second, and of the
    # third 4 ordered pairs / 2. n = 7, n_tie = 1, the mean of n_0 = 4 and n_1 = 2 is 3: by chance
    # 2 · 3 · 3 + 4 · 3 · 1 = 30. 1 − 6 · 4 / 30.
    assert krippendorff_alpha([[0, 0], [0, None], [1, 1, 0]]) == pytest.approx(0.2)


def test_alpha_does_not_depend_on_which_answer_is_called_0():
    units = [[0, 0], [0, 0], [1, 0], [0, 0, None], [1, 1]]
    for flipped in range(32):
        other = [
            [value if value is None or not flipped >> number & 1 else 1 - value for value in unit]
            for number, unit in enumerate(units)
        ]
        assert krippendorff_alpha(other) == pytest.approx(krippendorff_alpha(units))


def test_a_report_by_hand():
    decisions = [
        vote("alice", "p", 0, seconds=1.0, model_margin=0.5),
        vote("alice", "q", 1, left=1, seconds=3.0, model_margin=-0.5),
        vote("alice", "r", None, seconds=8.0),
        Decision("alice", "s", None, 0, "skip", seconds=100.0),
        vote("alice", "p", 0, left=1, repeat=True),  # the same answer, now on the right
        vote("alice", "q", 0, left=0, repeat=True),  # the other answer, on the left again
        vote("bob", "p", 0),
        vote("bob", "q", 0),
        vote("bob", "s", 1),
    ]
    report = report_on(decisions)
    alice = report.labellers["alice"]
    assert (alice.decided, alice.ties, alice.skipped, alice.seconds) == (3, 1, 1, 3.0)
    assert (alice.consistent.count, alice.consistent.of_all, alice.same_side) == (1, 2, 1)
    assert (alice.left.count, alice.left.of_all) == (3, 4)
    assert (alice.with_model.count, alice.with_model.of_all) == (1, 2)
    assert report.labellers["bob"].consistent.interval is None
    assert (report.pairs, report.shared) == (4, 2)
    assert (report.two["alice, bob"].count, report.two["alice, bob"].of_all) == (1, 2)
    # Values 0 0 | 1 0: o = 2, n = 4, the mean of n_0 = 3 and n_1 = 1 is 2: 1 − 3 · 2 / 8.
    assert report.alpha == 0.25


@pytest.fixture
def labelled(open_store, folder) -> Path:
    """Three labellers: all find answer 0 of the pairs 0 and 1 better; on 2 they have three opinions."""
    store = open_store()
    for name, third in (("alice", "tie"), ("bob", 0), ("carol", 1)):
        labeller = store.labeller(name)
        for wanted in (0, 0, third, "skip"):
            shown = labeller.next()
            assert shown is not None
            choice = wanted if isinstance(wanted, str) else "left" if shown.left == wanted else "right"
            decide(labeller, choice)
    store.close()
    return folder


def test_the_command_reports_and_writes_what_most_agree_on(labelled, tmp_path):
    agreed = tmp_path / "agreed.jsonl"
    result = CliRunner().invoke(cli, ["label", "report", str(labelled), "--json", "--agreed", str(agreed)])
    assert result.exit_code == 0, result.output
    report = json.loads(result.output[: result.output.rindex("}") + 1])
    assert sorted(report["labellers"]) == ["alice", "bob", "carol"]
    assert [one["skipped"] for one in report["labellers"].values()] == [1, 1, 1]
    assert (report["pairs"], report["shared"]) == (3, 3)
    # Values 000 | 000 | tie 0 1: differing 6 / 2, n = 9, n_tie = 1, the mean of 7 and 1 is 4, by chance
    # 2 · 16 + 4 · 4 = 48: 1 − 8 · 3 / 48.
    assert report["alpha"] == pytest.approx(0.5)
    rows = lines(agreed)
    assert [(row["prompt"], row["agreement"]) for row in rows] == [("Question 0?", 1), ("Question 1?", 1)]
    assert rows[0]["labellers"] == ["alice", "bob", "carol"]
    assert "labeller" not in rows[0]
    assert len(list(read_examples(str(agreed)))) == 2

    shown = CliRunner().invoke(cli, ["label", "report", str(labelled)])
    assert "alice, bob: the same answer for 2 of 3 (67 %, 21–94)" in shown.output
    assert "Krippendorff's alpha: 0.50" in shown.output


def test_rows_of_other_tools_are_reported_too(tmp_path):
    """A pair row with a labeller is enough, as `polar-ft data convert label-studio` writes it."""
    file = tmp_path / "team.jsonl"
    row = {"prompt": "p", "reference": "", "chosen": "a", "rejected": "b"}
    other = {**row, "chosen": "b", "rejected": "a"}
    file.write_text(
        "".join(json.dumps({**r, "labeller": name}) + "\n" for name, r in (("x", row), ("y", other)))
    )
    result = CliRunner().invoke(cli, ["label", "report", str(file)])
    assert "x, y: the same answer for 0 of 1" in result.output
    file.write_text(json.dumps(row) + "\n")
    result = CliRunner().invoke(cli, ["label", "report", str(file)])
    assert "team.jsonl:1: labeller: is missing" in str(result.exception)


def test_agreed_pairs_do_not_go_among_the_labellers(open_store, folder):
    decide(open_store(repeat=0).labeller("alice"), "left")
    result = CliRunner().invoke(
        cli, ["label", "report", str(folder), "--agreed", str(folder / "agreed.jsonl")]
    )
    assert "decisions of one more labeller" in str(result.exception)
    assert not (folder / "agreed.jsonl").exists()
